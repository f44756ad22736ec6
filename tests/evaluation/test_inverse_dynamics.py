"""The inverse-dynamics network: targets, pairs of pictures, training, and the choice of a checkpoint."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from dataset.actions import JUMP, PITCH, YAW, encode, to_gamefactory
from dataset.token_files import SAMPLE_TOKENS, ClipEntry, DataError, Manifest, write_token_file
from dataset.windows import TokenClips
from evaluation import inverse_dynamics as idm
from evaluation import inverse_dynamics_training as training
from evaluation.inverse_dynamics import SHIPPED_INVERSE_DYNAMICS, InverseDynamics, InverseDynamicsConfig
from runtime import checkpoint
from runtime.checkpoint import CheckpointError
from runtime.video import write_video

CPU = torch.device("cpu")
HEIGHT, WIDTH = 32, 64
TINY = InverseDynamicsConfig(HEIGHT, WIDTH, features=8, hidden=8)
FRAMES = 40
PIXELS_PER_DEGREE = 0.5  # of the sliding textures: 15 degrees are 7.5 pixels


def write_tokens(root: Path, actions: dict[str, np.ndarray], step: int = 1, **settings) -> Path:
    """Token files under root/tokens with the given actions [K-1, 5]; all tokens are 0.

    The clip "val" is in the split val. Every `step`-th frame of root/video/NAME.mp4 is kept.
    """
    folder = root / "tokens"
    folder.mkdir(parents=True)
    size = [HEIGHT, WIDTH]
    manifest = Manifest(settings.pop("fps", 16.0), size, [2, 2], 4, "0123456789abcdef", 70.0, **settings)
    for name, clip_actions in actions.items():
        frames = len(clip_actions) + 1
        write_token_file(
            folder / f"{name}.npz", np.zeros((frames, 2, 2)), clip_actions, np.zeros((frames, 5))
        )
        kept = [0, (frames - 1) * step, step]
        split = "val" if name == "val" else "train"
        manifest.clips.append(ClipEntry(name, f"{name}.npz", frames, split, f"../video/{name}.mp4", kept))
    manifest.save(folder)
    return folder


def key_of(clips: TokenClips) -> str:
    return training.data_key(clips.manifest, clips.entries)


def counted(number: int) -> np.ndarray:
    """Actions whose yaw is their index in hundredths, except for two jumps; the pitch is that of the clip."""
    actions = np.zeros((FRAMES - 1, 5), np.float32)
    actions[:, YAW] = np.arange(2, FRAMES + 1) / 100
    actions[[10, 20], YAW], actions[[10, 20], JUMP] = 0, 1
    actions[:, PITCH] = number / 10
    return actions


@pytest.fixture(scope="module")
def counting(tmp_path_factory) -> Path:
    """Two clips and one without a video. Every second frame is kept; its brightness is its index."""
    root = tmp_path_factory.mktemp("counting")
    folder = write_tokens(root, {"a": counted(0), "b": counted(1), "lost": counted(2)}, step=2)
    for name in ("a", "b"):
        size = 2 * HEIGHT, 2 * WIDTH, 3  # read_pairs resizes them
        frames = [np.full(size, 10 + 3 * i, np.uint8) for i in range(2 * FRAMES - 1)]
        write_video(root / "video" / f"{name}.mp4", frames, 16)
    return folder


def sliding(root: Path, clips: int, shuffled: bool = False) -> TokenClips:
    """Clips of 100 frames: a texture slides to the left by PIXELS_PER_DEGREE as the camera turns right.

    `shuffled` labels every frame with the turn of another one.
    """
    rng = np.random.default_rng(0)
    actions = {}
    for number in range(clips):
        yaw = rng.uniform(-1, 1, 99)
        at = np.cumsum(np.append(0, yaw * 15 * PIXELS_PER_DEGREE))
        at -= at.min()
        width = int(at.max()) + WIDTH + 2
        texture = cv2.resize(rng.uniform(0, 255, (HEIGHT // 4, width // 4, 3)), (width, HEIGHT))
        moves = [np.array([[1.0, 0, -x], [0, 1, 0]]) for x in at]
        frames = [cv2.warpAffine(texture, move, (WIDTH, HEIGHT)).astype(np.uint8) for move in moves]
        write_video(root / "video" / f"clip{number}.mp4", frames, 16)
        labelled = rng.permutation(yaw) if shuffled else yaw
        actions[f"clip{number}"] = np.pad(labelled[:, None], ((0, 0), (0, 4)))
    return TokenClips(write_tokens(root, actions), "train")


def test_labels_have_units_signs_and_classes():
    actions = np.array(
        [
            encode(3.0, -6.0, 1, 1, 1),
            encode(-7.5, 15.0, -1, -1, 0),
            encode(0, 0, 0.4, -0.4, 0.4),  # pressed for less than half of the time
            encode(0, 0, 0.6, -0.6, 0.6),
        ]
    )
    found = idm.labels(actions)
    assert found["yaw"].tolist() == pytest.approx([3, -7.5, 0, 0])
    assert found["pitch"].tolist() == pytest.approx([-6, 15, 0, 0])
    assert found["move_x"].tolist() == [2, 0, 1, 2], "left, none, right"
    assert found["move_z"].tolist() == [2, 0, 1, 0], "back, none, forward"
    assert found["jump"].tolist() == [1, 0, 0, 1]
    assert idm.labels(actions, degrees_per_unit=20.0)["yaw"][0] == pytest.approx(4)


def test_labels_agree_with_gamefactory_codes():
    actions = np.random.default_rng(0).uniform(-1, 1, (200, 5)).astype(np.float32)
    found = idm.labels(torch.from_numpy(actions))
    for i, action in enumerate(actions):
        codes = to_gamefactory(action)
        assert found["move_x"][i] == {1: 0, 0: 1, 2: 2}[codes["ad"]]
        assert found["move_z"][i] == {2: 0, 0: 1, 1: 2}[codes["ws"]]
        assert found["jump"][i] == codes["scs"]


def test_a_mirrored_pair_has_the_opposite_yaw_and_sideways_step():
    actions = np.array([encode(3, 4, 1, 1, 1), encode(-2, 1, -1, -1, 0), encode(5, -1, 1, 0, 0)])
    pictures = torch.rand(2, 3, 3, 8, 16)
    which = torch.tensor([True, True, False])
    before, after, found = training.mirror(*pictures, idm.labels(actions), which)
    wanted = idm.labels(actions * np.array([[-1, 1, -1, 1, 1], [-1, 1, -1, 1, 1], [1, 1, 1, 1, 1]]))
    for name in wanted:
        assert torch.equal(found[name], wanted[name]), name
    for mirrored, original in ((before, pictures[0]), (after, pictures[1])):
        assert torch.equal(mirrored[:2], original[:2].flip(3)) and torch.equal(mirrored[2], original[2])


def test_augmentation_is_the_same_for_both_pictures_of_a_pair():
    """Brightness, contrast and blur are shared; only the noise differs."""
    pictures = torch.rand(1, 8, 3, 16, 32).repeat(2, 1, 1, 1, 1)
    before, after = training.augment(pictures, torch.Generator().manual_seed(0))
    assert (before - pictures[0]).abs().mean() > 0.05
    assert (before - after).abs().mean() < 2 * training.NOISE
    assert before.min() >= 0 and before.max() <= 1


def test_pairs_are_the_pictures_around_their_action(counting, capsys):
    clips = TokenClips(counting, "train")
    before, after, actions = training.read_pairs(clips, 60, seed=0, progress=False)
    assert before.shape == after.shape == (60, HEIGHT, WIDTH, 3) and before.dtype == np.uint8
    assert actions.shape == (60, 5)
    assert "no pictures of lost" in capsys.readouterr().out
    assert [(actions[:, PITCH] == np.float32(n / 10)).sum() for n in range(3)] == [30, 30, 0], "evenly"
    turned = actions[:, YAW] > 0
    number = (actions[turned, YAW] * 100).round() - 2
    shown = [(pictures[turned].mean((1, 2, 3)) - 10) / 3 for pictures in (before, after)]
    assert shown[0] == pytest.approx(2 * number, abs=0.5)
    assert shown[1] == pytest.approx(2 * number + 2, abs=0.5), "one kept frame later"
    assert ((actions[:, JUMP] == 1) == (actions[:, YAW] == 0)).all()


def test_rare_actions_are_sampled_more_often(counting):
    clips = TokenClips(counting, "train")
    jumps = [(training.read_pairs(clips, 8, seed, progress=False)[2][:, JUMP] > 0).sum() for seed in range(4)]
    assert sum(jumps) >= 8, "2 of 39 actions are jumps, but about half of the sampled ones"


def test_pairs_are_a_function_of_the_seed(counting):
    clips = TokenClips(counting, "train")
    first, again, other = (training.read_pairs(clips, 12, seed, progress=False) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[2], other[2])


def test_short_clips_give_all_their_pairs(counting):
    assert len(training.read_pairs(TokenClips(counting, "train"), 1000, 0, progress=False)[2]) == 2 * (
        FRAMES - 1
    )


def test_data_without_videos_are_refused(tmp_path):
    folder = write_tokens(tmp_path, {"a": counted(0)})
    with pytest.raises(DataError, match=r"manifest\.json: none of the videos"):
        training.read_pairs(TokenClips(folder, "train"), 10, 0, progress=False)
    with pytest.raises(DataError, match="none of the videos"):
        training.train_inverse_dynamics(TokenClips(folder, "train"), 0, CPU, steps=1, pairs=10)


def test_the_cost_volume_finds_a_shift():
    features = torch.nn.functional.normalize(torch.randn(2, 16, 8, 12), dim=1)
    moved = features.roll((1, -2), (2, 3))  # one down, two to the left
    reach = 3
    fits = idm.cost_volume(features[:, :, ::2, ::2], moved, reach)
    assert fits.shape == (2, 49, 4, 6)
    wanted = (1 + reach) * 7 + (-2 + reach)
    assert (fits[:, :, :3, 1:].argmax(1) == wanted).all()
    assert torch.allclose(fits[:, wanted, :3, 1:], torch.ones(2, 3, 5))
    assert (fits[:, : 3 * 7, 0] == 0).all(), "above the upper border"


@pytest.mark.parametrize("size", [(72, 128), (16, 32), (64, 64), (8, 8)])
def test_any_size_divisible_by_8(size):
    model = InverseDynamics(InverseDynamicsConfig(*size)).eval()
    pictures = np.random.default_rng(0).integers(0, 256, (2, 3, *size, 3), dtype=np.uint8)
    found = idm.predict(model, *pictures)
    assert {name: values.shape for name, values in found.items()} == dict.fromkeys(found, (3,))
    assert list(found) == ["yaw", "pitch", "move_x", "move_z", "jump"]
    floats = torch.from_numpy(pictures).permute(0, 1, 4, 2, 3).float() / 255
    for name, values in idm.predict(model, *floats).items():
        assert values == pytest.approx(found[name], abs=1e-4), "pictures as bytes or as floats"
    assert sum(p.numel() for p in model.parameters()) * 4 < 1.5e6


def test_other_picture_sizes_are_refused(counting):
    with pytest.raises(ValueError, match="20x32"):
        InverseDynamicsConfig(20, 32)
    clips = TokenClips(counting, "train")
    clips.manifest.picture_size = [20, 32]
    with pytest.raises(DataError, match=r"manifest\.json: pictures of 20x32: both must be divisible by 8"):
        training.train_inverse_dynamics(clips, 0, CPU, steps=1, pairs=10)


def test_batches_do_not_mix_pairs(monkeypatch):
    torch.manual_seed(0)
    model = InverseDynamics(TINY).eval()
    pictures = torch.rand(2, 5, 3, HEIGHT, WIDTH)
    together = idm.predict(model, *pictures)
    monkeypatch.setattr(idm, "BATCH", 2)
    for name, values in idm.predict(model, *pictures).items():
        assert values == pytest.approx(together[name], abs=1e-4)


def test_training_learns_the_turn_and_not_from_shuffled_labels(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "BATCH", 16)
    right, wrong = sliding(tmp_path / "right", 5), sliding(tmp_path / "wrong", 5, shuffled=True)
    _, learned = training.train_inverse_dynamics(right, 0, CPU, steps=40, pairs=390)
    _, guessed = training.train_inverse_dynamics(wrong, 0, CPU, steps=40, pairs=390)
    assert learned["yaw_deg"] < 2.5, "of held-out textures; turns are 7.5 degrees on average"
    assert guessed["yaw_deg"] > 5


def test_training_is_a_function_of_the_seed(counting, one_thread):
    clips = TokenClips(counting, "train")
    state = torch.get_rng_state()
    first, again, other = (
        training.train_inverse_dynamics(clips, seed, CPU, steps=2, pairs=20)[0] for seed in (0, 0, 1)
    )
    weights = [torch.cat([p.flatten() for p in model.parameters()]) for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert not first.training
    assert torch.equal(state, torch.get_rng_state()), "the global generator is unchanged"


@pytest.fixture
def trained(monkeypatch, tmp_path) -> list[TokenClips]:
    """Replaces training, and lists its calls; the network that ships is one for other data."""
    calls = []

    def train(clips, seed, device, **_):
        calls.append(clips)
        manifest = clips.manifest
        torch.manual_seed(seed)
        config = InverseDynamicsConfig(*manifest.picture_size, manifest.camera_degrees_per_unit, 8, 8)
        return InverseDynamics(config).eval(), {"yaw_deg": 0.5}

    monkeypatch.setattr(training, "train_inverse_dynamics", train)
    monkeypatch.setattr(training, "SHIPPED_INVERSE_DYNAMICS", tmp_path / "idm.pt")
    other = TokenClips(write_tokens(tmp_path / "other", {"elsewhere": counted(0)}, fps=20.0), "train")
    training.save(tmp_path / "idm.pt", InverseDynamics(TINY), other)
    return calls


def test_a_network_is_trained_once_per_data_set(counting, trained, tmp_path):
    model, source = training.load_or_train(counting, 3, CPU, tmp_path / "cache", train=True)
    key = key_of(TokenClips(counting, "train"))
    assert len(trained) == 1 and "trained now" in source
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [f"idm_{key}.pt"]
    again, source = training.load_or_train(counting, 3, CPU, tmp_path / "cache", train=True)
    assert len(trained) == 1 and key in source and "now" not in source
    assert not again.training and not any(p.requires_grad for p in again.parameters())
    pictures = torch.rand(2, 4, 3, HEIGHT, WIDTH)
    for name, values in idm.predict(again, *pictures).items():
        assert np.array_equal(values, idm.predict(model, *pictures)[name])


def test_other_data_have_a_network_of_their_own(counting, trained, tmp_path):
    root = counting.parent
    training.load_or_train(counting, 0, CPU, tmp_path / "cache", train=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "video").symlink_to(root / "video")
    fewer = write_tokens(tmp_path / "mine", {"a": counted(0), "b": counted(1)}, step=2)
    training.load_or_train(fewer, 0, CPU, tmp_path / "cache", train=True)
    assert [len(clips.entries) for clips in trained] == [3, 2]
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_the_shipped_network_is_used_where_none_can_be_trained(counting, trained, tmp_path):
    _, source = training.load_or_train(counting, 0, CPU, tmp_path / "cache", train=False)
    assert "idm.pt, trained on other data" in source and "20 frames/s, here 16" in source
    for name in ("lost", "val"):  # no video; no training split
        folder = write_tokens(tmp_path / f"only_{name}", {name: counted(0)})
        assert "other data" in training.load_or_train(folder, 0, CPU, tmp_path / "cache", train=True)[1]
    assert not trained


def test_the_shipped_network_is_used_if_it_was_trained_on_this_data(counting, trained, tmp_path):
    training.save(tmp_path / "idm.pt", InverseDynamics(TINY), TokenClips(counting, "train"))
    _, source = training.load_or_train(counting, 0, CPU, tmp_path / "cache", train=True)
    assert not trained and "idm.pt, trained on this data's 3 training clips" in source


@pytest.mark.parametrize("change", [{"camera_degrees_per_unit": 18.75}, {"fps": 8.0}, "size", "length"])
def test_the_key_changes_with_the_data(counting, tmp_path, change):
    settings = change if isinstance(change, dict) else {}
    actions = {"a": counted(0), "b": counted(1), "lost": counted(2)}
    if change == "length":
        actions["a"] = actions["a"][:-1]
    clips = TokenClips(write_tokens(tmp_path, actions, step=2, **settings), "train")
    if change == "size":
        clips.manifest.picture_size = [HEIGHT, HEIGHT]
    assert key_of(clips) != key_of(TokenClips(counting, "train"))


def test_a_network_for_other_pictures_or_units_is_refused(counting, trained, tmp_path):
    for settings, message in (
        ({"camera_degrees_per_unit": 18.75}, r"camera_degrees_per_unit 18.75, .*idm\.pt expects 15"),
        ({}, r"pictures .*\[32, 64\], .*idm\.pt expects \[16, 32\]"),
    ):
        if not settings:
            training.save(
                tmp_path / "idm.pt",
                InverseDynamics(InverseDynamicsConfig(16, 32)),
                TokenClips(counting, "train"),
            )
        folder = write_tokens(tmp_path / f"with{len(settings)}", {"x": counted(0)}, **settings)
        with pytest.raises(DataError, match=message):
            training.load_or_train(folder, 0, CPU, tmp_path / "cache", train=False)


def test_loading_is_strict(counting, tmp_path):
    path = tmp_path / "idm.pt"
    training.save(path, InverseDynamics(TINY), TokenClips(counting, "train"), seed=1)
    model, content = idm.load(path)
    assert content["seed"] == 1 and model.config == TINY
    content["model"]["extra"] = torch.zeros(1)
    checkpoint.save(path, content)
    with pytest.raises(CheckpointError, match=r"idm\.pt: its weights do not fit .*extra"):
        idm.load(path)


def test_another_kind_is_refused(tiny):
    with pytest.raises(CheckpointError, match="expected .*'inverse_dynamics', found 'world_model'"):
        idm.load(tiny.world)


def test_the_shipped_network_is_accurate_on_the_sample_clips():
    model, content = idm.load(SHIPPED_INVERSE_DYNAMICS)
    assert SHIPPED_INVERSE_DYNAMICS.stat().st_size < 1.5e6
    clips = TokenClips(SAMPLE_TOKENS, "all")
    found = idm.accuracy(model, *training.read_pairs(clips, 150, 0, progress=False))
    assert found["yaw_deg"] < 0.5 and found["pitch_deg"] < 0.5
    assert found["move_x_f1"] > 0.5 and found["move_z_f1"] > 0.5 and found["jump_f1"] > 0.6
