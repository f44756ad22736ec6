"""The table of malformed inputs for campaign.py: files, constants, flags, scripts and outputs."""

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from campaign import Case
from conftest import TINY_WORLD, tiny_vqvae, world_seeds, write_depth_clip

import train
from dataset.token_files import ClipEntry, Manifest, write_token_file
from depth.depth_net import DepthConfig, DepthNet
from depth.predictor import DEPTH_KIND
from model_convGru import ConvGRUWorldModel
from rollout.world_model import world_content
from runtime import checkpoint
from runtime.video import save_image, write_video
from vq_vae.tokenizer import load_tokenizer, tokenizer_content

ROLLOUT = ("--checkpoint", "world.pt", "--vqvae_ckpt", "vqvae.pt", "--device", "cpu", "--precision", "fp32")
INFERENCE = (*ROLLOUT, "--start", "tokens/clip.npz", "--out", "outputs/walk.mp4")
TRAIN = (
    "DATA_DIR=tokens",
    "VQVAE_CKPT=vqvae.pt",
    "OUT_DIR=run",
    "MODEL=convgru",
    "EMBED_DIM=8",
    "HIDDEN_DIM=8",
    "LAYERS=1",
    "STEPS=2",
    "BATCH_SIZE=2",
    "SEQ_LEN=3",
    "SEQ_LEN_MAX=3",
    "AR_LEN_MAX=0",
    "VAL_ROLLOUTS=0",
    "DEVICE=cpu",
    "WANDB=disabled",
)
VQVAE = (
    "PICTURES=pictures.npz",
    "OUT_DIR=vq",
    "HEIGHT=32",
    "WIDTH=32",
    "CODEBOOK_SIZE=16",
    "EMBEDDING_DIM=4",
    "HIDDEN_DIM=8",
    "RESIDUAL_BLOCKS=1",
    "STEPS=1",
    "BATCH_SIZE=2",
    "DEVICE=cpu",
    "WANDB=disabled",
)
DEPTH = (
    "DATA_DIRS=clips",
    "VQVAE_CKPT=vqvae.pt",
    "CACHE_DIR=cache",
    "OUT_DIR=deep",
    "HEIGHT=16",
    "WIDTH=32",
    "CHANNELS=(8, 8)",
    "BLOCKS=(0, 0)",
    "VAL_FRACTION=0.5",
    "STEPS=1",
    "BATCH_SIZE=2",
    "DEVICE=cpu",
    "WANDB=disabled",
)
PREPROCESS = (
    "--parent_dir",
    "clips",
    "--out_dir",
    "out",
    "--vqvae_ckpt",
    "vqvae.pt",
    "--no_check",
    "--device",
    "cpu",
)


def write_world(folder: Path) -> None:
    """The sound files that the cases spoil: networks, clips, token files, a run, pictures, a script."""
    torch.set_num_threads(1)
    checkpoint.save(folder / "vqvae.pt", tokenizer_content(tiny_vqvae()))
    tokenizer = load_tokenizer(folder / "vqvae.pt")
    torch.manual_seed(0)
    data = {"fps": 16.0, "camera_degrees_per_unit": 15.0, "vertical_fov_degrees": 70.0}
    checkpoint.save(folder / "world.pt", world_content(ConvGRUWorldModel(TINY_WORLD, tokenizer), data=data))
    network = DepthNet(DepthConfig(16, 32, (8, 8), (0, 0)))
    checkpoint.save(folder / "depth.pt", checkpoint.content_of(DEPTH_KIND, network))
    rng = np.random.default_rng(0)
    for name, split in (("a", "train"), ("b", "val")):
        write_depth_clip(folder / "clips", name, world_seeds(split, 1)[0], rng)
    trajectory = folder / "minerl" / "run_1"
    write_video(trajectory / "recording.mp4", [np.full((64, 64, 3), 20 * k, np.uint8) for k in range(11)], 20)
    meta = {"success": True, "duration_ms": 500, "duration_steps": 10, "true_video_frame_count": 11}
    (trajectory / "metadata.json").write_text(json.dumps(meta))
    np.savez(trajectory / "rendered.npz", **{"action$camera": np.zeros((10, 2), np.float32)})
    entries = []
    (folder / "tokens").mkdir()
    for name, split in (("clip", "train"), ("held", "val")):
        actions = rng.uniform(-1, 1, (39, 5))
        write_token_file(
            folder / "tokens" / f"{name}.npz", rng.integers(0, 64, (40, 4, 8)), actions, np.zeros((40, 5))
        )
        entries.append(ClipEntry(name, f"{name}.npz", 40, split, f"../clips/video/{name}.mp4", [0, 39, 1]))
    Manifest(16.0, [16, 32], [4, 8], 64, tokenizer.fingerprint, 70.0, clips=entries).save(folder / "tokens")
    pictures = rng.integers(0, 256, (8, 32, 32, 3)).astype(np.uint8)
    np.savez(folder / "pictures.npz", train=pictures, val=pictures)
    save_image(folder / "photo.png", pictures[0])
    (folder / "script.txt").write_text("w*4\nyaw+0.5*2\n")
    os.chdir(folder)
    import sys

    sys.argv = ["train.py", *TRAIN]
    assert train.main() == 0
    for path in (folder / "run").iterdir():
        if path.name != "last.pt":
            path.unlink()


# ---------------------------------------------------------------- ways to spoil a file


def nothing(folder: Path) -> None:
    """Leaves all files sound."""


def write(name: str, content: bytes | str, folder: Path) -> None:
    path = folder / name
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def cut(name: str, share: float, folder: Path) -> None:
    """Keeps the first share of a file."""
    path = folder / name
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def flip(name: str, share: float, folder: Path) -> None:
    """Inverts 64 bytes from a position on."""
    content = bytearray((folder / name).read_bytes())
    start = int(len(content) * share)
    content[start : start + 64] = bytes(255 - byte for byte in content[start : start + 64])
    (folder / name).write_bytes(content)


def remove(name: str, folder: Path) -> None:
    (folder / name).unlink()


def as_folder(name: str, folder: Path) -> None:
    """A folder where the file should be."""
    (folder / name).unlink(missing_ok=True)
    (folder / name).mkdir(parents=True)


def damage(name: str) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """Ways to spoil any file."""
    for share in (0.0, 0.3, 0.98):
        yield f"cut to {share:.0%}", partial(cut, name, share)
    yield "flipped at the start", partial(flip, name, 0.0)
    yield "text", partial(write, name, "this is not what you expected\n")
    yield "zeros", partial(write, name, bytes(5000))
    yield "noise", partial(write, name, np.random.default_rng(0).bytes(5000))


def edit_json(name: str, change: Callable[[dict], object], folder: Path) -> None:
    """Changes the content of a JSON file."""
    content = json.loads((folder / name).read_text())
    changed = change(content)
    (folder / name).write_text(json.dumps(content if changed is None else changed))


def raw_json(name: str, old: str, new: str, folder: Path) -> None:
    """Replaces a text in a JSON file by one that json.dumps would not write."""
    text = (folder / name).read_text()
    assert old in text, (name, old)
    before, _, after = text.rpartition(old)  # entry 0 of the actions is not used
    (folder / name).write_text(before + new + after)


def edit_arrays(name: str, change: Callable[[dict], object], folder: Path) -> None:
    """Changes the arrays of an .npz file."""
    with np.load(folder / name) as file:
        arrays = dict(file)
    changed = change(arrays)
    np.savez_compressed(folder / name, **(arrays if changed is None else changed))


def bomb(name: str, array: str, folder: Path) -> None:
    """An .npz file of a few MB whose array takes 3.2 GB."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (3_200_000_000,)}
    )
    with zipfile.ZipFile(folder / name, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open(f"{array}.npy", "w", force_zip64=True) as file:
            file.write(header.getvalue())
            for _ in range(320):
                file.write(bytes(10_000_000))


def edit_checkpoint(name: str, change: Callable[[dict], object], folder: Path) -> None:
    """Changes the content of a checkpoint."""
    content = torch.load(folder / name, weights_only=True)
    changed = change(content)
    torch.save(content if changed is None else changed, folder / name)


class Payload:
    """Code that a pickle would run."""

    def __reduce__(self):
        return os.system, ("touch outputs_owned",)


# ---------------------------------------------------------------- the cases

DEEP, HUGE = "[" * 100_000, "1" + "0" * 400
TEXTS = {
    "empty": "",
    "open": "{",
    "list": "[]",
    "null": "null",
    "number": "7",
    "text": '"x"',
    "nested": DEEP,
    "nested objects": '{"a":' * 50_000,
    "not UTF-8": b"\xff\xfe{}",
    "NaN": "NaN",
    "no content": "{}",
    "long number": '{"a": ' + "9" * 6000 + "}",
}


def bad_metadata() -> Iterator[tuple[str, Callable[[Path], None]]]:
    """Metadata of a clip that make it useless."""
    name = "clips/metadata/a.json"
    for label, text in TEXTS.items():
        yield label, partial(write, name, text)
    for label, value in {"null": None, "a list": [], "empty": {}, "text": "x", "number": 3}.items():
        yield f"actions {label}", partial(edit_json, name, lambda c, v=value: c.update(actions=v))
    for field in ("ws", "yaw_delta"):
        for label, value in {"null": None, "text": "x", "list": [1], "object": {}}.items():
            yield (
                f"{field} {label}",
                partial(edit_json, name, lambda c, f=field, v=value: c["actions"]["3"].update({f: v})),
            )
    for field in ("ws", "ad", "scs"):
        yield f"{field} 9", partial(edit_json, name, lambda c, f=field: c["actions"]["3"].update({f: 9}))
        yield f"no {field}", partial(edit_json, name, lambda c, f=field: c["actions"]["3"].pop(f) and None)
    for label, text in {"NaN": "NaN", "infinite": "1e999", "huge": HUGE, "-infinite": "-Infinity"}.items():
        yield f"yaw_delta {label}", partial(raw_json, name, '"yaw_delta": 0', f'"yaw_delta": {text}')
        yield (
            f"pitch_delta {label}",
            partial(raw_json, name, f'"pitch_delta": {1 / 15}', f'"pitch_delta": {text}'),
        )
    yield "entry null", partial(edit_json, name, lambda c: c["actions"].update({"5": None}))
    yield "entry missing", partial(edit_json, name, lambda c: c["actions"].pop("5") and None)
    yield (
        "too many",
        partial(
            edit_json, name, lambda c: c["actions"].update({str(k): c["actions"]["1"] for k in range(12, 99)})
        ),
    )


def clip_cases() -> Iterator[Case]:
    """One bad clip of two is one skipped clip."""
    videos = [
        (f"video {label}", spoil) for label, spoil in damage("clips/video/a.mp4") if label != "cut to 98%"
    ]
    depths = [(f"depth {label}", spoil) for label, spoil in damage("clips/depth/a.npz")]
    depths.append(("depth bomb", partial(bomb, "clips/depth/a.npz", "log_inverse")))
    for label, change in {
        "shape": lambda a: a.update(log_inverse=a["log_inverse"][0]),
        "float": lambda a: a.update(log_inverse=a["log_inverse"].astype(float)),
        "object": lambda a: a.update(log_inverse=np.array([{}, None], object)),
        "short": lambda a: a.update(log_inverse=a["log_inverse"][:3]),
        "gone": lambda a: {"other": a["log_inverse"]},
    }.items():
        depths.append((f"depth {label}", partial(edit_arrays, "clips/depth/a.npz", change)))
    files = [
        ("no video", partial(remove, "clips/video/a.mp4")),
        ("metadata a folder", partial(as_folder, "clips/metadata/a.json")),
    ]
    for label, spoil in (*bad_metadata(), *videos, *depths, *files):
        yield Case(f"preprocess, {label}", "preprocess", PREPROCESS, spoil, "a", 0, ("out",))
    for label, spoil in list(bad_metadata())[::2] + videos[::3] + depths[::3]:
        yield Case(f"check, {label}", "record", ("--check", "clips"), spoil, "", 1)
        yield Case(
            f"pack, {label}",
            "tools.pack",
            ("clips", "packed", "--jobs", "1", "--width", "32", "--height", "16"),
            spoil,
            "a",
            0,
            ("packed",),
        )
    for label, spoil in list(bad_metadata())[::4]:
        yield Case(
            f"inference of a clip, {label}",
            "inference",
            (*ROLLOUT, "--start", "clips/video/a.mp4", "--out", "outputs/a.mp4"),
            spoil,
            "a.json",
        )
    for label, spoil in videos:
        yield Case(
            f"pictures of {label}",
            "vq_vae.preprocess_vqvae",
            ("clips", "made.npz", "--height", "16", "--width", "32"),
            spoil,
            "a.mp4",
            0,
            ("made",),
        )
    yield Case(
        "all pictures bad",
        "vq_vae.preprocess_vqvae",
        ("clips", "pictures.npz"),
        lambda f: [cut(f"clips/video/{n}.mp4", 0.1, f) for n in "ab"] and None,
        "clips",
    )
    yield Case(
        "all clips bad",
        "preprocess",
        PREPROCESS,
        lambda f: [write(f"clips/metadata/{n}.json", DEEP, f) for n in "ab"] and None,
        "a",
        1,
        ("out",),
    )
    minerl = ("--parent_dir", "minerl", "--fps_target", "10", *PREPROCESS[2:])
    name = "minerl/run_1/metadata.json"
    for label, text in TEXTS.items():
        yield Case(f"minerl, {label}", "preprocess", minerl, partial(write, name, text), "run_1", 1, ("out",))
    for field in ("duration_ms", "duration_steps", "true_video_frame_count"):
        for label, text in {
            "null": "null",
            "text": '"x"',
            "huge": HUGE,
            "infinite": "1e999",
            "NaN": "NaN",
            "list": "[]",
            "zero": "0",
        }.items():
            old = {"duration_ms": 500, "duration_steps": 10, "true_video_frame_count": 11}[field]
            fine = (field, label) == ("true_video_frame_count", "zero")
            yield Case(
                f"minerl, {field} {label}",
                "preprocess",
                minerl,
                partial(raw_json, name, f'"{field}": {old}', f'"{field}": {text}'),
                "" if fine else "run_1",
                0 if fine else 1,
                ("out",),
            )
    name = "minerl/run_1/rendered.npz"
    for label, spoil in (*damage(name), ("bomb", partial(bomb, name, "action$camera"))):
        yield Case(f"minerl, actions {label}", "preprocess", minerl, spoil, "run_1", 1, ("out",))
    for label, array in {
        "NaN": np.full((10, 2), np.nan),
        "flat": np.zeros(10),
        "objects": np.array([None]),
        "text": np.array([["a", "b"]] * 10),
        "empty": np.zeros((0, 2)),
    }.items():
        yield Case(
            f"minerl, camera {label}",
            "preprocess",
            minerl,
            partial(edit_arrays, name, lambda a, v=array: {"action$camera": v}),
            "run_1",
            1,
            ("out",),
        )


def token_cases() -> Iterator[Case]:
    """A broken token file is refused by everything that reads it."""
    name = "tokens/clip.npz"
    changes = {
        "code too large": lambda a: a["tokens"].__setitem__((3, 1, 1), 64),
        "negative code": lambda a: a.update(tokens=a["tokens"].astype(np.int64) - 5),
        "float codes": lambda a: a.update(tokens=a["tokens"].astype(np.float32)),
        "NaN action": lambda a: a["actions"].__setitem__((3, 1), np.nan),
        "infinite action": lambda a: a["actions"].__setitem__((3, 1), np.inf),
        "large action": lambda a: a["actions"].__setitem__((3, 1), 40),
        "infinite pose": lambda a: a["pose"].__setitem__((3, 1), np.inf),
        "text actions": lambda a: a.update(actions=a["actions"].astype(str)),
        "pickled": lambda a: a.update(actions=np.array([{}] * 39, object)),
        "flat tokens": lambda a: a.update(tokens=a["tokens"].reshape(40, -1)),
        "one action more": lambda a: a.update(actions=np.zeros((40, 5), np.float32)),
        "four axes": lambda a: a.update(actions=a["actions"][:, :4]),
        "short pose": lambda a: a.update(pose=a["pose"][:30]),
        "no pose": lambda a: a.pop("pose") is None or None,
        "no frames": lambda a: a.update(tokens=a["tokens"][:0], actions=a["actions"][:0], pose=a["pose"][:0]),
        "another grid": lambda a: a.update(tokens=a["tokens"][:, :3]),
        "a number": lambda a: a.update(tokens=np.array(3)),
        "nothing": lambda a: {"x": np.zeros(3)},
    }
    spoils = [(label, partial(edit_arrays, name, change)) for label, change in changes.items()]
    spoils += [
        *damage(name),
        ("bomb", partial(bomb, name, "tokens")),
        ("missing", partial(remove, name)),
        ("folder", partial(as_folder, name)),
    ]
    for label, spoil in spoils:
        yield Case(
            f"train, token file, {label}",
            "train",
            (*TRAIN, "OUT_DIR=new")
            if False
            else tuple("OUT_DIR=new" if w == "OUT_DIR=run" else w for w in TRAIN),
            spoil,
            "clip.npz",
        )
        yield Case(f"inference, token file, {label}", "inference", INFERENCE, spoil, "clip.npz")
    for label, spoil in spoils[::3]:
        yield Case(
            f"play, token file, {label}",
            "live_inference",
            (*ROLLOUT, "--start", name, "--headless", "--frames", "2", "--out", "outputs/p.mp4"),
            spoil,
            "clip.npz",
        )
        yield Case(
            f"evaluate, token file, {label}",
            "evaluate",
            (
                *ROLLOUT,
                "--data_dir",
                "tokens",
                "--split",
                "all",
                "--only",
                "teacher_forced",
                "--out",
                "outputs/e.json",
            ),
            spoil,
            "clip.npz",
        )


def manifest_cases() -> Iterator[Case]:
    """A broken manifest is refused, and preprocess.py does not write over what it names."""
    name = "tokens/manifest.json"
    changes = {
        f"{field} {label}": partial(edit_json, name, lambda c, f=field, v=value: c.update({f: v}))
        for field, values in {
            "fps": (None, "x", 0, -1, [], 1e300),
            "picture_size": (None, 3, [1], ["a", "b"], [0, 5], [1e9, 2]),
            "latent_size": (None, [4], [4, -8]),
            "codebook_size": (None, "64", 0, 1e9, 64.5),
            "tokenizer": (7, None, "other"),
            "vertical_fov_degrees": (0, 180, "wide"),
            "camera_degrees_per_unit": (0, None),
            "action_names": ([], None),
            "format": (None, 99),
            "clips": (None, {}, [7], [], [[]]),
            "skipped": (None, [3], [{}]),
            "val_fraction": (7, None),
            "depth_scale": (4,),
            "extra": (1,),
        }.items()
        for label, value in ((json.dumps(v), v) for v in values)
    }
    changes |= {
        f"clip's {field} {label}": partial(
            edit_json, name, lambda c, f=field, v=value: c["clips"][0].update({f: v})
        )
        for field, values in {
            "name": (None, 7, "held"),
            "file": (None, 7, "../photo.png", "/etc/passwd", "\0"),
            "frames": (None, 0, -3, 1e9, "40"),
            "split": (None, "test"),
            "video": (None, 5),
            "kept": (None, [], [0, 39, 0], ["a"], [0, 1e12, 1], [5, 5, 5, 5]),
            "depth": (7, "guessed"),
        }.items()
        for label, value in ((json.dumps(v), v) for v in values)
    }
    changes |= {
        f"a {label}": partial(raw_json, name, '"fps": 16.0', f'"fps": {text}')
        for label, text in {"NaN": "NaN", "huge number": HUGE, "infinity": "1e999"}.items()
    }
    changes |= {label: partial(write, name, text) for label, text in TEXTS.items()} | dict(damage(name))
    new = tuple("OUT_DIR=new" if word == "OUT_DIR=run" else word for word in TRAIN)
    for label, spoil in changes.items():
        yield Case(f"train, manifest, {label}", "train", new, spoil, "tokens")
    skip = ("tokenizer", "clips []", "extra", "val_fraction", "depth_scale")
    for label, spoil in list(changes.items())[::2]:
        if not label.startswith(skip):
            words = ("--parent_dir", "clips", "--out_dir", "tokens", *PREPROCESS[4:])
            yield Case(f"preprocess, manifest, {label}", "preprocess", words, spoil, "manifest.json")


def checkpoint_cases() -> Iterator[Case]:
    """A broken, stripped or malicious checkpoint is refused, and none of its code runs."""

    def nan(content: dict) -> None:
        next(v for v in content["model"].values() if v.is_floating_point()).fill_(float("nan"))

    def spoils(name: str, entries: tuple[str, ...]) -> Iterator[tuple[str, Callable[[Path], None]]]:
        yield from damage(name)
        yield "missing", partial(remove, name)
        yield "a folder", partial(as_folder, name)
        yield "pickle", partial(write, name, pickle.dumps(Payload(), protocol=2))
        yield "malicious", lambda folder: torch.save({"kind": Payload()}, folder / name)
        yield "NaN weights", partial(edit_checkpoint, name, nan)
        yield "another kind", partial(edit_checkpoint, name, lambda c: c.update(kind="other"))
        yield "a list", partial(edit_checkpoint, name, lambda c: [1, 2])
        yield "a tensor", partial(edit_checkpoint, name, lambda c: torch.zeros(3))
        yield (
            "config empty",
            partial(edit_checkpoint, name, lambda c: c.update(config={}) or c["config"].update(nonsense=1)),
        )
        yield "config a text", partial(edit_checkpoint, name, lambda c: c.update(config="x"))
        yield "weights a list", partial(edit_checkpoint, name, lambda c: c.update(model=[1]))
        yield (
            "weight of a wrong type",
            partial(edit_checkpoint, name, lambda c: c["model"].update({next(iter(c["model"])): "x"})),
        )
        yield (
            "weight missing",
            partial(edit_checkpoint, name, lambda c: c["model"].pop(next(iter(c["model"]))) is None or None),
        )
        for entry in entries:
            yield (
                f"without {entry}",
                partial(edit_checkpoint, name, lambda c, e=entry: c.pop(e) is None or None),
            )

    for label, spoil in spoils("world.pt", ("kind", "config", "model", "tokenizer")):
        yield Case(f"inference, world, {label}", "inference", INFERENCE, spoil, "world.pt")
    for label, value in {"text": "x", "NaN": float("nan"), "zero": 0, "a list": []}.items():
        yield Case(
            f"inference, fps {label}",
            "inference",
            INFERENCE,
            partial(edit_checkpoint, "world.pt", lambda c, v=value: c["data"].update(fps=v)),
            "world.pt",
        )
    yield Case(
        "inference, data a text",
        "inference",
        INFERENCE,
        partial(edit_checkpoint, "world.pt", lambda c: c.update(data="x")),
        "world.pt",
    )
    for label, spoil in spoils("vqvae.pt", ("kind", "config", "model", "fingerprint")):
        yield Case(f"preprocess, tokenizer, {label}", "preprocess", PREPROCESS, spoil, "vqvae.pt")
    for label, spoil in list(spoils("depth.pt", ("kind", "config", "model")))[::2]:
        yield Case(
            f"preprocess, depth, {label}",
            "preprocess",
            (*PREPROCESS, "--depth", "predicted", "--depth_ckpt", "depth.pt"),
            spoil,
            "depth.pt",
        )
    entries = (
        "kind",
        "config",
        "model",
        "tokenizer",
        "optimizer",
        "scaler",
        "rng",
        "step",
        "best",
        "position",
        "metrics",
        "grown",
    )
    for label, spoil in spoils("run/last.pt", entries):
        if label not in ("missing", "a folder"):
            yield Case(f"resume, {label}", "train", (*TRAIN[:7], "STEPS=3", *TRAIN[8:]), spoil, "last.pt")
    for entry in ("optimizer", "rng", "step", "best", "position", "metrics"):
        yield Case(
            f"resume, {entry} a text",
            "train",
            (*TRAIN[:7], "STEPS=3", *TRAIN[8:]),
            partial(edit_checkpoint, "run/last.pt", lambda c, e=entry: c.update({e: "x"})),
            "last.pt",
        )
    for label, spoil in list(spoils("run/last.pt", ()))[:9]:
        yield Case(
            f"strip, {label}", "tools.strip_checkpoint", ("run/last.pt", "outputs/x.pt"), spoil, "last.pt"
        )
        yield Case(
            f"convert, {label}", "tools.convert_checkpoint", ("run/last.pt", "outputs/x.pt"), spoil, "last.pt"
        )


def picture_cases() -> Iterator[Case]:
    """Pictures to start from, and the file of pictures for the tokenizer."""
    words = (*ROLLOUT, "--start", "photo.png", "--script", "w*2", "--out", "outputs/walk.mp4")
    spoils = [s for s in damage("photo.png") if s[0] != "cut to 98%"]
    header = bytes.fromhex("89504e470d0a1a0a0000000d49484452") + (40_000).to_bytes(4, "big") * 2
    spoils += [
        ("40,000 x 40,000", partial(write, "photo.png", header + bytes.fromhex("0802000000") + bytes(60)))
    ]
    spoils += [("missing", partial(remove, "photo.png")), ("a folder", partial(as_folder, "photo.png"))]
    for label, spoil in spoils:
        yield Case(f"inference, picture, {label}", "inference", words, spoil, "photo.png")
    name = "pictures.npz"
    changes = {
        "no val": lambda a: {"train": a["train"]},
        "floats": lambda a: a.update(train=a["train"].astype(float)),
        "another size": lambda a: a.update(val=a["val"][:, :8]),
        "empty": lambda a: a.update(train=a["train"][:0]),
        "objects": lambda a: a.update(train=np.array([None, {}], object)),
    }
    spoils = [(label, partial(edit_arrays, name, change)) for label, change in changes.items()]
    for label, spoil in (
        *spoils,
        *damage(name),
        ("bomb", partial(bomb, name, "train")),
        ("missing", partial(remove, name)),
    ):
        yield Case(f"train_vqvae, pictures, {label}", "vq_vae.train_vqvae", VQVAE, spoil, "pictures.npz")


def constant_cases() -> Iterator[Case]:
    """Constants out of their range are refused before anything is loaded."""
    positive = ("BATCH_SIZE", "LOG_STEPS", "VAL_STEPS", "SAVE_STEPS")
    rows = {
        "train": (
            TRAIN,
            {
                n: ("0", "-1", "1.5", "x", "")
                for n in (*positive, "LAYERS", "SEQ_LEN", "PICTURE_STEPS", "CHANNELS")
            }
            | {
                n: ("2", "-0.1", "nan", "x")
                for n in ("TOKEN_NOISE", "MASKED_DECODING", "SIMILAR_CODES", "SS_MIN_TEACHER_PROB")
            }
            | {
                "LR": ("0", "-1", "nan", "inf", "x"),
                "KEEP": ("-1",),
                "PRECISION": ("foo",),
                "AR_GROWTH": ("foo",),
                "MODEL": ("foo",),
                "WANDB": ("foo",),
                "PERCEPTUAL": ("foo",),
                "KERNEL_SIZE": ("2", "0"),
                "RESUME": ("maybe",),
                "SEED": ("-1", "1e3"),
                "GRAD_CLIP": ("0", "nan"),
                "SAVE_MINUTES": ("0", "nan"),
                "LOSS_CELLS": ("0", "2"),
                "LABEL_SMOOTHING": ("1", "-1"),
                "SELF_FED_TEMPERATURE": ("0",),
                "HIDDEN_DIM": ("999999999",),
                "REVEAL": ("1",),
                "DEVICE": ("abacus",),
                "STEPS": ("-5", HUGE),
            },
        ),
        "vq_vae.train_vqvae": (
            VQVAE,
            {n: ("0", "x") for n in (*positive, "EMBEDDING_DIM", "VAL_PICTURES")}
            | {
                "EMA_DECAY": ("1", "nan"),
                "HEIGHT": ("7", "0"),
                "HIDDEN_DIM": ("3",),
                "CODEBOOK_SIZE": ("1", "99999999"),
                "PERCEPTUAL_RAMP": ("-1",),
                "PRECISION": ("fp8",),
            },
        ),
        "depth.train_depth": (
            DEPTH,
            {n: ("0", "x") for n in (*positive, "FRAME_STEP")}
            | {
                "CHANNELS": ("3", "()", "(8,", "('a', 'b')", "(8, 8, 8)"),
                "BLOCKS": ("(-1, 0)", "(0,)"),
                "VAL_FRACTION": ("2", "nan"),
                "DROPOUT": ("1",),
                "HEIGHT": ("7",),
            },
        ),
    }
    for script, (words, values) in rows.items():
        for name, texts in values.items():
            for text in texts:
                changed = tuple(word for word in words if not word.startswith(f"{name}="))
                told = (
                    "CHANNELS"
                    if script.startswith("depth") and name in ("BLOCKS", "CHANNELS") and "8, 8, 8" in text
                    else name
                )
                yield Case(
                    f"{script} {name}={text[:20]}",
                    script,
                    (*changed, f"{name}={text}"),
                    nothing,
                    told if name not in ("DEVICE",) else "abacus",
                )
    for word in ("LR", "=", "LR==3", "\0=1", "LR=1 LR=2", "lr=3", "--STEPS=3", "OUT_DIR=a\0b"):
        yield Case(f"train {word!r}", "train", (*TRAIN, word), nothing, "")


def flag_cases() -> Iterator[Case]:
    """Flags out of their range."""
    rows = {
        "inference": (
            INFERENCE,
            "--topp 2;--topp 0;--topp nan;--topk -1;--temperature 0;--temperature inf;--passes 0;--trust nan;--redraw -1;--fps 0;--scale 0;--context_frames -1;--seed -1;--seed x;--precision fp8;--device abacus;--columns x;--frames 0",
        ),
        "live_inference": (
            (*ROLLOUT, "--headless"),
            "--port 0;--port 99999;--port -1;--fps 0;--fps nan;--mouse_sens 0;--scale -1;--frames 0;--start nowhere;--out a.txt",
        ),
        "preprocess": (
            PREPROCESS,
            "--vertical_fov 0;--vertical_fov 180;--vertical_fov nan;--fps_target 0;--fps_target nan;--fps_target inf;--val_fraction 2;--val_fraction nan;--trim_seconds -1;--trim_seconds inf;--workers 0;--encode_batch 0;--shard 0/2;--shard 3/2;--shard x;--resize x;--precision fp8;--device abacus;--parent_dir nowhere",
        ),
        "record": (
            ("--out", "new"),
            "--vertical_fov 0;--vertical_fov nan;--size 0x0;--size 5x5;--size x;--clips 0;--frames -1;--biomes moon;--time yesterday;--seed -1;--jobs 0",
        ),
        "vq_vae.preprocess_vqvae": (
            ("clips", "made.npz"),
            "--gap 0;--gap x;--height 0;--width 7;--val_fraction nan",
        ),
        "tools.pack": (("clips", "packed"), "--width 0;--width 3;--crf 99;--crf -1;--jobs 0"),
        "evaluate": (
            (*ROLLOUT, "--data_dir", "tokens"),
            "--seed -1;--topp 2;--only nothing;--out a.txt;--split none;--data_dir nowhere",
        ),
        "benchmark": ((), "--seconds 0;--rounds 0;--device abacus;nothing"),
    }
    for script, (words, flags) in rows.items():
        for text in flags.split(";"):
            yield Case(
                f"{script} {text}",
                script,
                (*words, *text.split()),
                nothing,
                text.split()[-1] if "unrecognized" not in text else "",
            )


def script_cases() -> Iterator[Case]:
    """Action scripts."""
    texts = (
        "",
        " ",
        "w*0",
        "w*-1",
        "w*1.5",
        "w**2",
        "fly",
        "w+",
        "w,",
        ",w",
        "(w",
        "w)",
        "()",
        "(w)*",
        "yaw",
        "yaw+",
        "yaw+2",
        "yaw+nan",
        "pitch-1e9",
        "[0,0,0,0]",
        "[0,0,0,0,0",
        "[nan,0,0,0,0]",
        "[2,0,0,0,0]",
        "[0,0,0,0,0,0]",
        "w*" + "9" * 18,
        "w*" + "9" * 5000,
        "(" * 5000 + "w" + ")" * 5000,
        "(((w*9999)*9999)*9999)*9999",
        "w\0",
        "w*\u0663x",
        "\u202e",
        "w;d",
        "@nowhere.txt",
        "@",
        "@clips",
        "@photo.png",
    )
    for text in texts:
        yield Case(
            f"inference --script {text[:20]!r}",
            "inference",
            (*INFERENCE, "--script", text),
            nothing,
            "" if "\0" in text or len(text) > 200 else text.strip("@ ")[:20],
        )
    for label, content in {
        "empty": "",
        "comments": "# w\n",
        "noise": np.random.default_rng(1).bytes(2000),
        "late error": "w\n" * 50 + "fly\n",
        "long line": "w+" * 100_000,
    }.items():
        yield Case(
            f"inference, script file {label}",
            "inference",
            (*INFERENCE, "--script", "@script.txt"),
            partial(write, "script.txt", content),
            "script.txt",
        )


def output_cases() -> Iterator[Case]:
    """Outputs that cannot or must not be written."""

    def words(script_words: tuple[str, ...], flag: str, value: str) -> tuple[str, ...]:
        return (*script_words, flag, value)

    outs = {
        "a folder": "clips",
        "below a file": "photo.png/x.mp4",
        "a text": "x.txt",
        "too long": "x" * 300 + ".mp4",
        "no ending": "walk",
        "an input": "vqvae.pt",
    }
    for label, value in outs.items():
        yield Case(
            f"inference --out {label}", "inference", words(INFERENCE, "--out", value), nothing, value[:20]
        )
    for value in ("tokens/clip.npz", "world.pt", "tokens/manifest.json", "clips"):
        yield Case(
            f"inference --save_actions {value}",
            "inference",
            words(INFERENCE, "--save_actions", value),
            nothing,
            value,
        )
    yield Case("a full disk", "tools.strip_checkpoint", ("run/last.pt", "/dev/full"), nothing, "/dev/full")
    for script, command in {"train": TRAIN, "vq_vae.train_vqvae": VQVAE, "depth.train_depth": DEPTH}.items():
        for label, value in {
            "a file": "photo.png",
            "below a file": "photo.png/run",
            "too long": "x" * 300,
        }.items():
            changed = tuple(f"OUT_DIR={value}" if word.startswith("OUT_DIR=") else word for word in command)
            yield Case(f"{script} OUT_DIR {label}", script, changed, nothing, value[:20])
    for label, value in {
        "a file": "photo.png",
        "below a file": "photo.png/run",
        "too long": "x" * 300,
    }.items():
        yield Case(
            f"preprocess --out_dir {label}",
            "preprocess",
            (*PREPROCESS[:3], value, *PREPROCESS[4:]),
            nothing,
            value[:20],
        )
        yield Case(f"pack into {label}", "tools.pack", ("clips", value), nothing, value[:20])
        yield Case(f"cut into {label}", "tools.cut_start_places", ("tokens", value, "x=clip:0"), nothing, "")
        yield Case(
            f"pictures into {label}",
            "vq_vae.preprocess_vqvae",
            ("clips", f"{value}/p.npz"),
            nothing,
            value[:20],
        )
        yield Case(
            f"evaluate --out {label}",
            "evaluate",
            (*ROLLOUT, "--data_dir", "tokens", "--out", f"{value}/e.json"),
            nothing,
            value[:20],
        )
        yield Case(f"record --out {label}", "record", ("--out", value), nothing, value[:20])
    for script in ("tools.strip_checkpoint", "tools.convert_checkpoint"):
        yield Case(f"{script} onto itself", script, ("run/last.pt", "run/last.pt"), nothing, "last.pt")
    yield Case("pack onto itself", "tools.pack", ("clips", "clips"), nothing, "")
    yield Case(
        "depth cache a file",
        "depth.train_depth",
        tuple("CACHE_DIR=photo.png" if w.startswith("CACHE") else w for w in DEPTH),
        nothing,
        "photo.png",
    )
    for word in (
        "x=clip",
        "x=nowhere:0",
        "x=clip:-1",
        "x=clip:999",
        "x=clip:" + "9" * 30,
        "../x=clip:0",
        "=clip:0",
    ):
        yield Case(f"cut {word[:20]}", "tools.cut_start_places", ("tokens", "outputs/s", word), nothing, "")


def all_cases() -> list[Case]:
    """Every case; the order mixes the kinds, so that every n-th case is a fair slice."""
    kinds = (
        clip_cases,
        token_cases,
        manifest_cases,
        checkpoint_cases,
        picture_cases,
        constant_cases,
        flag_cases,
        script_cases,
        output_cases,
    )
    every = [case for kind in kinds for case in kind()]
    return [every[i * 7919 % len(every)] for i in range(len(every))] if len(every) % 7919 else every
