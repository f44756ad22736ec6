"""Checkpoints: round trips, atomic writes, and refusal of files that cannot be used."""

import os
import pickle
from pathlib import Path

import pytest
import torch
from conftest import TINY_WORLD, tiny_tokenizer, tiny_vqvae

from model_convGru import ConvGRUWorldModel
from rollout.world_model import load_world_model, world_content
from runtime import checkpoint
from runtime.checkpoint import CheckpointError
from vq_vae.tokenizer import checksum, load_tokenizer, tokenizer_content


def tiny_world(seed: int = 0) -> ConvGRUWorldModel:
    torch.manual_seed(seed)
    return ConvGRUWorldModel(TINY_WORLD, tiny_tokenizer())


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A tokenizer and a world model that go together."""
    checkpoint.save(tmp_path / "vqvae.pt", tokenizer_content(tiny_vqvae()))
    extra = {
        "step": 3,
        "optimizer": {"lr": 0.1},
        "scaler": {},
        "rng": {"cpu": torch.zeros(4)},
        "position": {},
    }
    content = world_content(tiny_world(), **extra)
    checkpoint.save(tmp_path / "world.pt", content)
    return tmp_path / "vqvae.pt", tmp_path / "world.pt"


def test_round_trip_gives_the_same_outputs(files):
    tokenizer = load_tokenizer(files[0])
    model, content = load_world_model(files[1], tokenizer)
    assert content["step"] == 3
    assert not tokenizer.vqvae.training and not model.training
    assert not any(p.requires_grad for p in tokenizer.vqvae.parameters())
    pictures = torch.rand(2, 3, 16, 32)
    assert torch.equal(tokenizer.encode(pictures), tiny_tokenizer().encode(pictures))
    tokens, actions = torch.randint(0, 64, (1, 3, 4, 8)), torch.rand(1, 3, 5)
    assert torch.equal(model(tokens, actions)[0], tiny_world().eval()(tokens, actions)[0])


def test_crash_while_writing_leaves_the_old_file(files, monkeypatch):
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


def test_the_file_is_renamed_after_it_is_complete(tmp_path, monkeypatch):
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
    """A malicious object in a pickle."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def test_no_code_in_a_file_is_executed(tmp_path):
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
def test_other_files_are_refused(tmp_path, garbage):
    (tmp_path / "x.pt").write_bytes(garbage)
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        checkpoint.load(tmp_path / "x.pt")


def test_other_kind_is_refused(files):
    with pytest.raises(CheckpointError, match=r"world\.pt: expected .*'vq_vae', found 'world_model'"):
        load_tokenizer(files[1])
    tokenizer = load_tokenizer(files[0])
    with pytest.raises(CheckpointError, match=r"vqvae\.pt: expected .*'world_model', found 'vq_vae'"):
        load_world_model(files[0], tokenizer)


def test_world_refuses_another_tokenizer(files, tmp_path):
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


def test_unknown_config_is_refused(files):
    content = checkpoint.load(files[1])
    content["config"]["from_the_future"] = 1
    checkpoint.save(files[1], content)
    with pytest.raises(CheckpointError, match="from_the_future"):
        load_world_model(files[1], load_tokenizer(files[0]))


def test_changed_tokenizer_is_refused(files):
    content = checkpoint.load(files[0])
    content["model"]["quantizer.codebook"][3] += 0.01
    checkpoint.save(files[0], content)
    with pytest.raises(CheckpointError, match=r"vqvae\.pt: its weights have checksum"):
        load_tokenizer(files[0])


def test_checksum_changes_with_codes_and_pictures_only():
    original = checksum(tiny_vqvae())
    assert original == checksum(tiny_vqvae()), "a function of the weights"
    for name in tiny_vqvae().state_dict():
        changed = tiny_vqvae()
        tensor = changed.state_dict()[name]
        first = (0,) * tensor.dim()
        tensor[first] = tensor[first] == 0 if tensor.dtype == torch.bool else tensor[first] + 1e-3
        same = checksum(changed) == original
        assert same == ("ema_" in name), f"{name}: only the running sums of training do not count"
