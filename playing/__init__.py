"""What live_inference.py plays with: the session (no windows in it), and what shows it to a person."""
