"""Training and evaluation jobs: records, queue, training process, evaluation and publishing."""
