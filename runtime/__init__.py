"""Shared by all scripts: settings, device, checkpoint files, run logs, video files, provenance."""

from runtime.worker_process import end_with_parent

end_with_parent()
