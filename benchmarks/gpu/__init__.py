"""GPU checklist: `python -m benchmarks.gpu` measures everything that the documentation claims about GPUs."""
