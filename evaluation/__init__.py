"""The measurements of evaluate.py: one module per section, and the clips, tables and plots they share."""
