"""Shared by all scripts: settings, device, checkpoint files, run logs, video files, provenance, writing of files."""
