"""The measurements of benchmark.py beside the training step."""
