"""The measurements of evaluate.py, a module for each section of its table."""
