"""A slice of the campaign of malformed inputs, and generated inputs for the readers (hypothesis)."""

import contextlib
import json
import string
import subprocess
import sys
from pathlib import Path

import numpy as np
from conftest import write_manifest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from dataset import actions
from dataset.recordings import ClipError, gamefactory_track, read_gamefactory_entries, read_json
from dataset.token_files import MANIFEST, DataError, Manifest, read_token_file
from playing import web
from rollout.action_script import ScriptError, parse
from runtime.arrays import ArraysError, read_arrays

EXAMPLES = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
NUMBER = st.one_of(st.floats(), st.integers(-(10**400), 10**400), st.none(), st.text(max_size=3))
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "ws": st.sampled_from([0, 1, 2, 9, None, "x", 10**400]),
        "ad": st.integers(-1, 3),
        "scs": st.integers(-1, 4),
        "yaw_delta": NUMBER,
        "pitch_delta": NUMBER,
        "pos": st.lists(NUMBER, max_size=4) | NUMBER,
        "yaw": NUMBER,
        "pitch": NUMBER,
    },
)


def test_a_slice_of_the_campaign():
    """Every 40th case; `make fuzz` runs all of them."""
    script = Path(__file__).with_name("campaign.py")
    done = subprocess.run(
        [sys.executable, str(script), "--every", "40"], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]


@EXAMPLES
@given(st.one_of(st.binary(max_size=200), JSON.map(lambda value: json.dumps(value).encode())))
def test_any_metadata_is_read_or_refused(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    try:
        assert isinstance(read_json(path), dict)
    except ClipError as error:
        assert str(path) in str(error) and "\n" not in str(error)


@EXAMPLES
@given(st.dictionaries(st.integers(0, 6).map(str), ENTRY | JSON, max_size=6))
def test_any_entries_give_finite_actions_or_are_refused(entries):
    path = Path("a.json")
    try:
        vectors, pose = gamefactory_track(read_gamefactory_entries(path, {"actions": entries}), path)
    except ClipError as error:
        assert "a.json" in str(error) and len(str(error)) < 1000
    else:
        assert np.isfinite(vectors).all() and np.abs(vectors).max(initial=0) <= 1
        assert len(pose) == len(vectors) + 1


@EXAMPLES
@given(st.data())
def test_any_manifest_is_sound_or_refused(tmp_path, data):
    write_manifest(tmp_path / "clip.npz", "0" * 16)
    content = json.loads((tmp_path / MANIFEST).read_text())
    target = content if data.draw(st.booleans()) else content["clips"][0]
    target[data.draw(st.sampled_from(sorted(target)))] = data.draw(JSON)
    (tmp_path / MANIFEST).write_text(json.dumps(content))
    try:
        manifest = Manifest.load(tmp_path)
    except DataError as error:
        assert str(tmp_path / MANIFEST) in str(error) and "\n" not in str(error)
    else:
        assert 0 < manifest.fps < 1000 and all(clip.frames > 0 for clip in manifest.clips)


@EXAMPLES
@given(st.data())
def test_any_arrays_are_a_sound_token_file_or_refused(tmp_path, data):
    kinds = st.sampled_from(["uint16", "int64", "float32", "bool", "<U2"])
    sizes = arrays_of.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)
    names = data.draw(st.sets(st.sampled_from(["tokens", "actions", "pose", "other"])))
    content = {name: data.draw(arrays_of.arrays(data.draw(kinds), sizes)) for name in names}
    if data.draw(st.booleans()):
        sound = {"tokens": np.zeros((3, 2, 2), np.uint16), "actions": np.zeros((2, 5), np.float32)}
        content = sound | {"pose": np.zeros((3, 5), np.float32)} | content
    np.savez(tmp_path / "a.npz", **content)
    try:
        found = read_token_file(tmp_path / "a.npz", codes=64)
    except DataError as error:
        assert "a.npz" in str(error) and "\n" not in str(error)
    else:
        assert found["tokens"].max(initial=0) < 64 and len(found["actions"]) == len(found["tokens"]) - 1
        assert np.isfinite(found["actions"]).all()


@EXAMPLES
@given(st.integers(0, 10_000), st.binary(min_size=1, max_size=40))
def test_a_damaged_npz_is_read_or_refused(tmp_path, position, noise):
    np.savez_compressed(tmp_path / "a.npz", tokens=np.arange(400).reshape(20, 20))
    content = bytearray((tmp_path / "a.npz").read_bytes())
    start = position % len(content)
    content[start : start + len(noise)] = noise
    (tmp_path / "a.npz").write_bytes(content)
    try:
        read_arrays(tmp_path / "a.npz", ("tokens",))
    except ArraysError as error:
        assert "a.npz" in str(error) and "\n" not in str(error)


PARTS = ["w", "a*3", "(w,d)*2", "yaw+0.5", "[0,0,0,0,0]", ")", "*", ","]
SCRIPT = st.one_of(
    st.text(max_size=30),
    st.text("wasdjumpidleyawpitch+-*,()[]0123456789. ", max_size=40),
    st.lists(st.sampled_from(PARTS), max_size=8).map("".join),
)


@EXAMPLES
@given(SCRIPT)
def test_any_action_script_is_read_or_refused(text):
    try:
        vectors = parse(text)
    except ScriptError as error:
        assert "character" in str(error)
    else:
        assert vectors.shape[1] == actions.ACTION_DIM and np.abs(vectors).max() <= 1


@EXAMPLES
@given(st.one_of(st.text(string.printable, max_size=60), JSON.map(json.dumps)))
def test_any_message_of_the_page_is_read_or_ignored(text):
    with contextlib.suppress(ValueError):
        kind, _ = web.parse(text)
        assert kind in ("press", "release", "command", "look", "shown", "blur")
