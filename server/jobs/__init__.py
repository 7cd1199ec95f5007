"""Jobs: training runs over the served base, their records, and how text becomes training tokens."""
