"""Sampling tokens and rolling a world model out: from a context, by actions."""
