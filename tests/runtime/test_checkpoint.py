"""What is written can be read back, and what cannot be read says so."""

import os
import pickle
import runpy
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY_WORLD, tiny_tokenizer, tiny_vqvae

from model_convGru import ConvGRUWorldModel
from rollout.world_model import WORLD_KIND, load_world_model, world_content
from runtime import checkpoint
from runtime.checkpoint import CheckpointError
from vq_vae.tokenizer import fingerprint, load_tokenizer, tokenizer_content


def tiny_world(seed: int = 0) -> ConvGRUWorldModel:
    torch.manual_seed(seed)
    return ConvGRUWorldModel(TINY_WORLD)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A tokenizer and a world model that go together."""
    tokenizer = tiny_tokenizer()
    checkpoint.save(tmp_path / "vqvae.pt", tokenizer_content(tokenizer))
    extra = {
        "step": 3,
        "optimizer": {"lr": 0.1},
        "scaler": {},
        "rng": {"cpu": torch.zeros(4)},
        "position": {},
    }
    content = world_content(tiny_world(), fingerprint(tokenizer), **extra)
    checkpoint.save(tmp_path / "world.pt", content)
    return tmp_path / "vqvae.pt", tmp_path / "world.pt"


def test_round_trip_gives_the_same_outputs(files):
    tokenizer = load_tokenizer(files[0])
    model, content = load_world_model(files[1], tokenizer)
    assert content["step"] == 3
    assert not tokenizer.training and not model.training
    assert not any(p.requires_grad for p in tokenizer.parameters())
    pictures = torch.rand(2, 3, 16, 32)
    assert torch.equal(tokenizer.encode(pictures), tiny_tokenizer().encode(pictures))
    tokens, actions = torch.randint(0, 64, (1, 3, 4, 8)), torch.rand(1, 3, 5)
    assert torch.equal(model(tokens, actions)[0], tiny_world().eval()(tokens, actions)[0])


def test_a_crash_while_writing_leaves_the_old_file(files, monkeypatch):
    before = files[1].read_bytes()
    real = torch.save

    def half(content, file):
        real(content, file)
        file.truncate(100)
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(files[1], {"kind": "other"})
    monkeypatch.undo()
    assert files[1].read_bytes() == before
    assert checkpoint.load(files[1])["step"] == 3


def test_the_rename_is_the_last_thing_that_happens(tmp_path, monkeypatch):
    """Until the whole file is on disk, its name must not exist."""
    seen = []

    def rename(source, target):
        seen.append((Path(target).exists(), torch.load(source, weights_only=True)["step"]))
        original(source, target)

    original = os.replace
    monkeypatch.setattr(os, "replace", rename)
    checkpoint.save(tmp_path / "new" / "a.pt", {"step": 5})
    assert seen == [(False, 5)]
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.pt"], "no temporary file is left"


class Payload:
    """What an attacker would put in a pickle."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def test_nothing_in_a_file_is_executed(tmp_path):
    torch.save(Payload(tmp_path / "owned"), tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Payload(tmp_path / "owned"), protocol=2))
    for name in ("a.pt", "b.pt"):
        with pytest.raises(CheckpointError, match="not a readable checkpoint"):
            checkpoint.load(tmp_path / name)
        assert not (tmp_path / "owned").exists()


def test_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere\.pt: no such checkpoint"):
        checkpoint.load(tmp_path / "nowhere.pt")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_truncated_file(files, share):
    whole = files[1].read_bytes()
    files[1].write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(CheckpointError, match=r"world\.pt: not a readable checkpoint") as raised:
        checkpoint.load(files[1])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("garbage", [b"hello world", b"\x80\x02}q\x00.", bytes(range(256)), b"PK\x03\x04"])
def test_garbage(tmp_path, garbage):
    (tmp_path / "x.pt").write_bytes(garbage)
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        checkpoint.load(tmp_path / "x.pt")


def test_the_other_kind_is_refused(files):
    with pytest.raises(CheckpointError, match=r"world\.pt: expected .*'vq_vae', found 'world_model'"):
        load_tokenizer(files[1])
    tokenizer = load_tokenizer(files[0])
    with pytest.raises(CheckpointError, match=r"vqvae\.pt: expected .*'world_model', found 'vq_vae'"):
        load_world_model(files[0], tokenizer)


def test_a_world_refuses_another_tokenizer(files, tmp_path):
    checkpoint.save(tmp_path / "other.pt", tokenizer_content(tiny_vqvae(seed=1)))
    other = load_tokenizer(tmp_path / "other.pt")
    with pytest.raises(CheckpointError) as raised:
        load_world_model(files[1], other)
    message = str(raised.value)
    own = load_tokenizer(files[0]).fingerprint
    assert own in message and other.fingerprint in message, "both fingerprints"
    assert "--vqvae_ckpt" in message and "world.pt" in message, "which files"
    assert "\n" not in message


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_loading_is_strict(files, change):
    content = checkpoint.load(files[1])
    weights = content["model"]
    if change == "missing":
        del weights["head.bias"]
    elif change == "unexpected":
        weights["head.extra"] = torch.zeros(1)
    else:
        weights["head.bias"] = torch.zeros(65)
    checkpoint.save(files[1], content)
    with pytest.raises(CheckpointError, match=r"world\.pt: its weights do not fit .*head\.") as raised:
        load_world_model(files[1], load_tokenizer(files[0]))
    assert "\n" not in str(raised.value)


def test_an_unknown_config_is_refused(files):
    content = checkpoint.load(files[1])
    content["config"]["from_the_future"] = 1
    checkpoint.save(files[1], content)
    with pytest.raises(CheckpointError, match="from_the_future"):
        load_world_model(files[1], load_tokenizer(files[0]))


def test_a_tokenizer_that_was_tampered_with_is_refused(files):
    content = checkpoint.load(files[0])
    content["model"]["quantizer.codebook"][3] += 0.01
    checkpoint.save(files[0], content)
    with pytest.raises(CheckpointError, match=r"vqvae\.pt: its weights have fingerprint"):
        load_tokenizer(files[0])


def test_fingerprint_changes_with_all_that_matters_and_nothing_else():
    original = fingerprint(tiny_tokenizer())
    assert original == fingerprint(tiny_tokenizer()), "a function of the weights"
    for name in tiny_tokenizer().state_dict():
        changed = tiny_tokenizer()
        tensor = changed.state_dict()[name]
        first = (0,) * tensor.dim()
        tensor[first] = tensor[first] == 0 if tensor.dtype == torch.bool else tensor[first] + 1e-3
        same = fingerprint(changed) == original
        assert same == ("ema_" in name), f"{name}: only the running sums of training do not count"


def run_strip(monkeypatch, *words: object) -> None:
    """`python checkpoint.py WORDS`, without a process of its own."""
    monkeypatch.setattr(sys, "argv", ["checkpoint.py", *map(str, words)])
    runpy.run_path(checkpoint.__file__, run_name="__main__")


def test_strip_keeps_what_play_needs(files, tmp_path, monkeypatch):
    run_strip(monkeypatch, files[1], tmp_path / "play.pt")
    content = checkpoint.load(tmp_path / "play.pt", WORLD_KIND)
    assert not {"optimizer", "scaler", "rng", "position"} & content.keys()
    assert content["step"] == 3
    load_world_model(tmp_path / "play.pt", load_tokenizer(files[0]))


def test_strip_of_a_missing_file_is_one_line(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_strip(monkeypatch, tmp_path / "no.pt", tmp_path / "out.pt")
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "no such checkpoint" in message
