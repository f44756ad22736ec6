"""rollout/world_file.py and tools/pack_world.py: a packed world plays as its parts do, and files that are
damaged or made to harm are refused with one clear error."""

import hashlib
import pickle
import zipfile
from argparse import ArgumentParser
from pathlib import Path

import pytest
import torch
from conftest import TinyFiles, tiny_vqvae

import inference
import live_inference
from rollout import world_file
from rollout.arguments import add_arguments, config_of
from rollout.world_file import SUMS, WorldFileError, unpack_world_file
from runtime import checkpoint
from runtime.config import SettingError
from runtime.video import read_frames
from tools import pack_world
from vq_vae.tokenizer import tokenizer_content

SCRIPT = ["--script", "w*3,yaw+0.5*3", "--precision", "fp32", "--device", "cpu", "--context_frames", "4"]


@pytest.fixture(scope="module")
def packed(tiny: TinyFiles, tmp_path_factory) -> Path:
    """The tiny world in one file."""
    out = tmp_path_factory.mktemp("packed") / "tiny.zip"
    files = {"--checkpoint": tiny.world, "--vqvae_ckpt": tiny.tokenizer, "--starts": tiny.tokens.parent}
    words = [str(out), *(str(word) for pair in files.items() for word in pair)]
    assert pack_world.main(words) == 0
    return out


def rewritten(packed: Path, target: Path, changes: dict[str, bytes | None]) -> Path:
    """A copy of a world file with some members replaced, added, or (None) left out."""
    with zipfile.ZipFile(packed) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()} | changes
    with zipfile.ZipFile(target, "w") as archive:
        for name, content in contents.items():
            if content is not None:
                archive.writestr(name, content)
    return target


def generated(out: Path, *words: str) -> list[bytes]:
    """The frames of a rollout by inference.py."""
    assert inference.main([*words, *SCRIPT, "--out", str(out)]) == 0
    return [frame.tobytes() for frame in read_frames(out)]


def test_a_packed_world_generates_what_its_parts_do(packed, tiny, tmp_path, capsys):
    from_parts = generated(tmp_path / "a.mp4", *tiny.flags[:4], "--start", str(tiny.tokens))
    assert from_parts == generated(tmp_path / "b.mp4", "--world", str(packed))
    assert from_parts == generated(tmp_path / "c.mp4", "--world", str(packed), "--start", "clip")
    played = ["--world", str(packed), *SCRIPT, "--out", str(tmp_path / "play.mp4")]
    assert live_inference.main(played) == 0 and (tmp_path / "play.mp4").is_file()


def test_the_file_holds_weights_places_and_a_card_but_no_training_state(packed):
    with zipfile.ZipFile(packed) as archive:
        names = set(archive.namelist())
        card = archive.read("card.md").decode()
    assert names == {"world.pt", "vqvae.pt", "card.md", "starts/manifest.json", "starts/clip.npz", SUMS}
    assert "architecture convgru" in card and "16.0 frames/s" in card
    content = checkpoint.load(unpack_world_file(packed) / "world.pt")
    assert "optimizer" not in content and content["data"]["fps"] == 16.0


def test_packing_the_same_world_twice_gives_the_same_file(packed, tiny, tmp_path):
    files = {"--checkpoint": tiny.world, "--vqvae_ckpt": tiny.tokenizer, "--starts": tiny.tokens.parent}
    words = [str(tmp_path / "tiny.zip"), *(str(word) for pair in files.items() for word in pair)]
    assert pack_world.main(words) == 0
    assert (tmp_path / "tiny.zip").read_bytes() == packed.read_bytes()


def test_what_does_not_belong_together_is_not_packed(tiny, tmp_path, capsys):
    other = tmp_path / "other.pt"
    checkpoint.save(other, tokenizer_content(tiny_vqvae(seed=3)))
    words = [str(tmp_path / "x.zip"), "--checkpoint", str(tiny.world), "--vqvae_ckpt", str(other)]
    assert pack_world.main(words) == 2 and "belongs to tokenizer" in capsys.readouterr().err
    assert pack_world.main([str(tmp_path / "x.pt")]) == 2 and "ends in .zip" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.pt"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"vqvae.pt": None}, "it has no vqvae.pt"),
        ({"../evil.pt": b"x"}, r"holds '\.\./evil\.pt', which no world file has"),
        ({"/evil": b"x"}, "holds '/evil'"),
        ({"starts/../../evil.npz": b"x"}, "which no world file has"),
        ({"starts/more.npz": b"x"}, f"its {SUMS} does not list all"),
        ({"card.md": b"other"}, "sha256 of its card.md begins with .* damaged; copy it again"),
        ({SUMS: b"\xff\xfe"}, "not a readable world file"),
        ({"card.md": b"x" * (2**20 + 1)}, "its card.md takes 1 MB, more than"),
        ({f"starts/p{n}.npz": b"" for n in range(300)}, "holds 306 files"),
    ],
)
def test_other_members_sizes_and_contents_are_refused(packed, tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr(world_file.tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    bad = rewritten(packed, tmp_path / "bad.zip", changes)
    with pytest.raises(WorldFileError, match=message) as raised:
        unpack_world_file(bad)
    assert str(raised.value).startswith(f"{bad}: ") and "\n" not in str(raised.value)
    assert {path.name for path in tmp_path.iterdir()} == {"bad.zip", "temporary"}


def test_damaged_and_missing_files_are_refused(packed, tmp_path, capsys):
    cut = tmp_path / "cut.zip"
    cut.write_bytes(packed.read_bytes()[:-100])
    flipped = bytearray(packed.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    (tmp_path / "flipped.zip").write_bytes(flipped)
    for name, message in (
        ("cut", "copy it again"),
        ("flipped", "copy it again"),
        ("none", "no such file; make one with"),
    ):
        assert inference.main(["--world", str(tmp_path / f"{name}.zip"), *SCRIPT]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {tmp_path}/{name}.zip: ") and message in error


def test_code_in_a_world_is_not_run(packed, tmp_path, capsys):
    class Harm:
        def __reduce__(self):
            return Path.touch, (tmp_path / "harmed",)

    evil = pickle.dumps(Harm())
    with zipfile.ZipFile(packed) as archive:
        sums = archive.read(SUMS).decode()
        old = hashlib.sha256(archive.read("world.pt")).hexdigest()
    sums = sums.replace(old, hashlib.sha256(evil).hexdigest())
    bad = rewritten(packed, tmp_path / "bad.zip", {"world.pt": evil, SUMS: sums.encode()})
    assert inference.main(["--world", str(bad), *SCRIPT]) == 2
    assert "not a readable checkpoint" in capsys.readouterr().err and not (tmp_path / "harmed").exists()


def test_a_world_file_and_a_part_of_a_world_exclude_each_other(packed):
    parser = ArgumentParser()
    add_arguments(parser)
    with pytest.raises(SettingError, match="has its own --checkpoint"):
        config_of(parser.parse_args(["--world", str(packed), "--checkpoint", "a.pt"]))


def test_the_world_file_is_an_input_that_is_never_overwritten(packed, tmp_path, capsys):
    link = tmp_path / "world.mp4"
    link.symlink_to(packed)
    before = packed.read_bytes()
    assert inference.main(["--world", str(packed), *SCRIPT, "--out", str(link)]) == 2
    assert "would be overwritten" in capsys.readouterr().err and packed.read_bytes() == before


def test_weights_survive_packing(packed, tiny):
    content = checkpoint.load(unpack_world_file(packed) / "world.pt")
    for name, value in checkpoint.load(tiny.world)["model"].items():
        assert torch.equal(content["model"][name], value)
