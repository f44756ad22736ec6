"""Parts of benchmark.py: the training step, data loading and preprocessing, one step of play."""
