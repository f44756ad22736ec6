"""The training log: always on disk, in wandb where that works, and never the end of a run."""

import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from runtime import run_log
from runtime.config import SettingError
from runtime.outputs import OutputError


class FailingRun:
    """A wandb run that takes one entry and fails from then on."""

    def __init__(self):
        self.entries = []

    def log(self, metrics, step):
        if self.entries:
            raise ConnectionError("the server is gone")
        self.entries.append((step, metrics))

    def finish(self):
        raise ConnectionError("the server is gone")


def fake_wandb(started: list[dict]) -> SimpleNamespace:
    """A wandb module that records the arguments of `init`."""

    def init(**arguments):
        started.append(arguments)
        return SimpleNamespace(log=lambda *_, **__: None, finish=lambda: None)

    return SimpleNamespace(init=init)


def test_a_failure_of_wandb_does_not_end_the_run(tmp_path, capsys):
    log = run_log.RunLog(tmp_path, "disabled", "project", {})
    log.run = failing = FailingRun()
    for step in (1, 2, 3):
        log.write(step, {"loss": 1.0 / step})
    log.close()
    assert failing.entries == [(1, {"loss": 1.0})]
    assert "the server is gone; continuing without it" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]


def test_wandb_that_cannot_start_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    broken = fake_wandb([])
    broken.init = lambda **_: (_ for _ in ()).throw(RuntimeError("no network"))
    monkeypatch.setitem(sys.modules, "wandb", broken)
    log = run_log.RunLog(tmp_path, "online", "project", {})
    log.write(1, {"loss": 1.0})
    log.close()
    printed = capsys.readouterr().out
    assert "wandb: no network; continuing without it" in printed and "wandb: disabled" in printed


def test_a_resumed_run_continues_the_same_wandb_run(tmp_path, monkeypatch):
    started: list[dict] = []
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(started))
    for resumed in (None, 0, 0, None, 0):
        run_log.RunLog(tmp_path, "online", "project", {"LR": 0.1}, resumed).close()
    ids = [s["id"] for s in started]
    assert ids[0] == ids[1] == ids[2] and ids[3] == ids[4] and ids[0] != ids[3], "a new run has a new id"
    assert {s["resume"] for s in started} == {"allow"}


def test_a_run_that_is_resumed_without_an_earlier_wandb_run_starts_one(tmp_path, monkeypatch):
    started: list[dict] = []
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(started))
    run_log.RunLog(tmp_path, "online", "project", {}, resumed_step=1).close()
    assert started[0]["id"]


def test_wandb_offline_takes_numbers_and_pictures_and_keeps_the_run_id(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_SILENT", "true")
    ids = []
    for step, resumed in ((1, None), (2, 1)):
        log = run_log.RunLog(tmp_path, "offline", "project", {"LR": 0.1}, resumed)
        log.write(step, {"loss": 1.0})
        log.picture(step, "truth | prediction", np.zeros((8, 8, 3), np.uint8))
        assert log.run is not None, capsys.readouterr().out
        ids.append(log.run.id)
        log.close()
    assert ids[0] == ids[1]
    assert list(tmp_path.glob(f"wandb/offline-run-*-{ids[0]}"))


@pytest.mark.parametrize("key, mode", [("", "disabled"), ("0" * 40, "online")])
def test_auto_never_asks(tmp_path, monkeypatch, key, mode):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", key)
    assert run_log.wandb_mode("auto") == mode
    with pytest.raises(SettingError, match="WANDB=sometimes: expected one of"):
        run_log.wandb_mode("sometimes")


def test_means_are_of_the_steps_since_the_last_log_line():
    means = run_log.Means()
    means.add(3, {"loss": 1.0, "gap": math.nan})
    means.add(5, {"loss": 3.0, "gap": 4.0, "rare": math.nan})
    row, rate, seconds = means.take()
    assert row == {"loss": 2.0, "gap": 4.0}, "NaN has no part in a mean"
    assert rate == pytest.approx(8 / seconds)
    means.add(1, {"loss": 7.0})
    assert means.take()[0] == {"loss": 7.0}


def test_rows_that_a_resumed_run_will_write_again_are_removed(tmp_path):
    log = run_log.RunLog(tmp_path, "disabled", "project", {})
    for step in (2, 4, 6):
        log.write(step, {"loss": 1.0})
    log.close()
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 8, "lo')  # killed while writing
    run_log.RunLog(tmp_path, "disabled", "project", {}, resumed_step=4).close()
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4]


def test_a_full_disk_is_an_error_that_names_the_log(tmp_path):
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    log = run_log.RunLog(tmp_path, "disabled", "project", {})
    with pytest.raises(OutputError, match="log.jsonl: cannot be written: No space left"):
        log.write(1, {"loss": 1.0})
    log.close()
