"""The files of a training run: falling back to a good checkpoint, pruning, moving an earlier run aside."""

from pathlib import Path

import pytest
import torch

from runtime import checkpoint
from runtime.checkpoint import CheckpointError
from runtime.run_folder import last_good, remove_old_steps, set_aside


def write(path: Path, step: int, value: float = 0.0) -> None:
    content = {"kind": "k", "config": {}, "model": {"w": torch.full((2,), value)}, "step": step}
    torch.save(content, path)


def test_the_newest_good_checkpoint_stands_in_for_a_bad_last_one(tmp_path, capsys):
    assert last_good(tmp_path, "k") is None
    write(tmp_path / "last.pt", 9)
    assert last_good(tmp_path, "k")[1]["step"] == 9
    assert last_good(tmp_path, "k", resume=False) is None
    for name, step, value in (("best", 5, 0.0), ("step_000006", 6, torch.nan), ("step_000004", 4, 0.0)):
        write(tmp_path / f"{name}.pt", step, value)
    for damage in (lambda: write(tmp_path / "last.pt", 9, torch.inf), lambda: cut(tmp_path / "last.pt")):
        damage()
        path, content = last_good(tmp_path, "k")
        assert (path.name, content["step"]) == ("best.pt", 5)
        printed = capsys.readouterr().err
        assert f"{tmp_path}/last.pt" in printed and f"continuing from {tmp_path}/best.pt" in printed


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def test_without_a_good_checkpoint_the_run_is_refused(tmp_path):
    write(tmp_path / "last.pt", 3, torch.nan)
    with pytest.raises(CheckpointError, match="last.pt: its weights w are not finite.*RESUME=False"):
        last_good(tmp_path, "k")


def test_checkpoints_are_removed_in_the_order_of_their_steps(tmp_path):
    for step in (999_000, 1_000_000, 1_001_000, 5_000_000):
        write(tmp_path / f"step_{step:06d}.pt", step)
    remove_old_steps(tmp_path, 2, 1_001_000)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"step_1000000.pt", "step_1001000.pt", "step_5000000.pt"}
    remove_old_steps(tmp_path, 0, 1_001_000)
    assert [path.name for path in tmp_path.iterdir()] == ["step_5000000.pt"]


def test_the_files_of_an_earlier_run_are_moved_not_overwritten(tmp_path, capsys):
    set_aside(tmp_path)
    assert not list(tmp_path.iterdir()) and not capsys.readouterr().out
    for n in (1, 2):
        for name in ("last.pt", "best.pt", "step_000001.pt", "log.jsonl", "val_000500.png", "mine.txt"):
            (tmp_path / name).write_text(f"{name} {n}")
        set_aside(tmp_path)
        assert f"are now in {tmp_path}/earlier-{n}" in capsys.readouterr().out
        assert (tmp_path / f"earlier-{n}" / "last.pt").read_text() == f"last.pt {n}"
        assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {"mine.txt"}


def test_weights_that_are_not_finite_never_replace_good_ones(tmp_path):
    path = tmp_path / "last.pt"
    write(path, 1)
    before = path.read_bytes()
    bad = {"kind": "k", "config": {}, "model": {"w": torch.tensor([0.0, torch.nan])}, "step": 2}
    with pytest.raises(CheckpointError, match="last.pt: not written, because the weights w are not finite"):
        checkpoint.save(path, bad)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["last.pt"]
