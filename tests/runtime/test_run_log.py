"""The training log: on disk always, in wandb where that works, and never the end of a run."""

import json

import numpy as np
import pytest

from runtime import run_log as logs


class BrokenRun:
    """A wandb run that takes one entry and fails from then on."""

    def __init__(self):
        self.taken = []

    def log(self, metrics, step):
        if self.taken:
            raise ConnectionError("the server is gone")
        self.taken.append((step, metrics))

    def finish(self):
        raise ConnectionError("the server is gone")


def test_a_logger_that_fails_ends_nothing(tmp_path, capsys):
    log = logs.RunLog(tmp_path, "disabled", "project", {})
    log.run = broken = BrokenRun()
    for step in (1, 2, 3):
        log.write(step, {"loss": 1.0 / step})
    log.close()
    assert broken.taken == [(1, {"loss": 1.0})]
    assert "the server is gone; going on without it" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]


def test_wandb_offline_takes_numbers_and_pictures(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_SILENT", "true")
    log = logs.RunLog(tmp_path, "offline", "project", {"LR": 0.1})
    log.write(1, {"loss": 1.0})
    log.picture(1, "truth | prediction", np.zeros((8, 8, 3), np.uint8))
    assert log.run is not None, capsys.readouterr().out
    log.close()
    assert list(tmp_path.glob("wandb/offline-run-*"))


@pytest.mark.parametrize("key, mode", [("", "disabled"), ("0" * 40, "online")])
def test_auto_asks_for_nothing(tmp_path, monkeypatch, key, mode):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", key)
    assert logs.wandb_mode("auto") == mode
    with pytest.raises(ValueError, match="expected one of"):
        logs.wandb_mode("sometimes")
