"""evaluate.py: models whose tokens are known exactly, and the script at a tiny size.

tests/evaluation/test_evaluation.py tests what is measured on pictures.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_WORLD, PixelDistance, tiny_vqvae

import evaluate
from dataset.token_files import ClipEntry, DataError, Manifest, write_token_file
from dataset.windows import TokenClips
from evaluation import held_out_clips, inverse_dynamics, picture_networks, rollouts, teacher_forced
from evaluation.aggregate import Scores
from evaluation.evaluated_model import EvaluatedModel
from evaluation.held_out_clips import HeldOutClips, spread_windows
from evaluation.picture_networks import PictureNetworks
from evaluation.plan import Plan
from metrics import PSNR_CEILING, psnr
from model_convGru import ConvGRUWorldModel, Prediction
from rollout.rollout import Rollout
from rollout.sampling import PLAY, SamplingConfig
from rollout.world_model import load_world_model, world_content
from runtime import checkpoint, provenance
from runtime.config import SettingError
from runtime.video import read_frames, write_video
from vq_vae.tokenizer import load_tokenizer, tokenizer_content

CODES = TINY_WORLD.codebook_size
SMALL = Plan(
    contexts=(1, 6, 16), horizons=(1, 4, 8, 16, 20), windows=4, teacher_forced_frames=10_000, start_windows=2,
    still_windows=2, still_starts=2, still_seconds=3, memory_windows=2, look_aways=2, long_rollouts=2,
    long_frames=128, walk_starts=2, walk_seconds=2, depth_windows=4,
)  # fmt: skip
NO_NETWORKS = PictureNetworks({}, torch.nn.Identity(), None)


@dataclass(frozen=True)
class Files:
    """Paths of the test's files."""

    tokenizer: Path
    world: Path
    tokens: Path

    def flags(self, *more: object) -> list[str]:
        """A command line with these files and `more` flags."""
        files = ("--checkpoint", self.world, "--vqvae_ckpt", self.tokenizer, "--data_dir", self.tokens)
        return [str(word) for word in (*files, "--device", "cpu", *more)]


def write_clip(folder: Path, name: str, tokens: np.ndarray, split: str, kept: list[int]) -> ClipEntry:
    frames = len(tokens)
    actions = np.random.default_rng(frames).uniform(-1, 1, (frames - 1, 5))
    write_token_file(folder / f"{name}.npz", tokens, actions, np.zeros((frames, 5)))
    return ClipEntry(name, f"{name}.npz", frames, split, f"../video/{name}.mp4", kept)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Files:
    """Three held-out clips and a training clip.

    `counting` adds 1 to every token from frame to frame, `still` never changes. `counting` and `random` have
    videos of 79 frames, of which every second one is kept.
    """
    root = tmp_path_factory.mktemp("eval")
    checkpoint.save(root / "vqvae.pt", tokenizer_content(tiny_vqvae()))
    tokenizer = load_tokenizer(root / "vqvae.pt")
    torch.manual_seed(1)
    content = world_content(
        ConvGRUWorldModel(TINY_WORLD, tokenizer),
        step=12,
        data={"fps": 16.0, "camera_degrees_per_unit": 15.0},
    )
    checkpoint.save(root / "world.pt", content)
    (root / "tokens").mkdir()
    rng = np.random.default_rng(0)
    first = rng.integers(0, CODES, (1, 4, 8))
    counting = (first + np.arange(60)[:, None, None]) % CODES
    manifest = Manifest(16.0, [16, 32], [4, 8], CODES, tokenizer.fingerprint, 70.0)
    every_second = [0, 78, 2]
    manifest.clips = [
        write_clip(root / "tokens", "counting", counting[:40], "val", every_second),
        write_clip(root / "tokens", "random", rng.integers(0, CODES, (40, 4, 8)), "val", every_second),
        write_clip(root / "tokens", "still", first.repeat(50, 0), "val", [0, 49, 1]),
        write_clip(root / "tokens", "counting_too", counting, "train", [0, 59, 1]),
    ]
    manifest.save(root / "tokens")
    for number, name in enumerate(("counting", "random")):
        # The brightness is the frame's index in the video, so that a wrong frame is recognised.
        frames = [np.full((16, 32, 3), 20 + 2 * i + number, np.uint8) for i in range(79)]
        write_video(root / "video" / f"{name}.mp4", frames, 16)
    return Files(root / "vqvae.pt", root / "world.pt", root / "tokens")


@pytest.fixture(scope="module")
def tokenizer(files):
    return load_tokenizer(files.tokenizer)


@pytest.fixture(scope="module")
def model(files, tokenizer) -> ConvGRUWorldModel:
    return load_world_model(files.world, tokenizer)[0]


class Counter(ConvGRUWorldModel):
    """Predicts with certainty that every token grows by `stride`."""

    stride = 1

    def predict(self, tokens, actions, state, observed=True, picture=None, true_pose=None):
        return Prediction(tokens), state

    def logits(self, prediction, cells=None, trust=0.0):
        wanted = (prediction.features + self.stride) % CODES
        return 50.0 * F.one_hot(wanted, CODES).movedim(-1, 1).float()


def evaluated(model: ConvGRUWorldModel, sampling: SamplingConfig | None = None) -> EvaluatedModel:
    return EvaluatedModel(
        "world", Path("world.pt"), model, {}, sampling or SamplingConfig(), 0, torch.float32
    )


def held_out_of(files: Files, tokenizer, split: str) -> HeldOutClips:
    return HeldOutClips(TokenClips(files.tokens, split), tokenizer, seed=0)


def test_a_kept_primed_rollout_does_not_change_the_result(files, tokenizer):
    """`EvaluatedModel.rollout` primes once for equal contexts, and again for another one."""
    held_out = held_out_of(files, tokenizer, "all")
    torch.manual_seed(1)
    world = evaluated(ConvGRUWorldModel(TINY_WORLD, tokenizer))
    windows = held_out.windows(9, 20)  # more than one batch
    tokens, actions, pose = held_out.clips.batch(windows, 9)
    pose = pose[:, :5]
    inputs = [
        (tokens[:, :5], actions, pose),
        (tokens[:, :5], -actions, pose),
        (tokens[:, 1:6], actions, pose),
    ]
    inputs[1][1][:, :4] = actions[:, :4]  # the same until the rollout begins
    kept = [world.rollout(*given, "rollout") for given in (*inputs, inputs[0])]
    for given, generated in zip((*inputs, inputs[0]), kept, strict=True):
        world.primed.clear()
        assert torch.equal(world.rollout(*given, "rollout"), generated)
    assert not torch.equal(kept[0], kept[2])


def whole_clips(held_out: HeldOutClips) -> list[tuple[int, int, int]]:
    return teacher_forced.stretches(held_out.lengths, 10_000)


def test_teacher_forced_is_the_cross_entropy_of_each_whole_clip(files, tokenizer, model):
    held_out = held_out_of(files, tokenizer, "all")
    rows = teacher_forced.predict(held_out, evaluated(model), whole_clips(held_out))
    for i in range(4):
        tokens = torch.from_numpy(held_out.clips.tokens[i].astype(np.int64))[None]
        with torch.no_grad():
            logits, _ = model(tokens[:, :-1], torch.from_numpy(held_out.clips.actions[i])[None])
        mine = rows["clip"] == i
        nats = F.cross_entropy(logits[0], tokens[0, 1:], reduction="sum").item()
        assert rows["nats"][mine].sum() == pytest.approx(nats, rel=1e-5), "clips do not get mixed up"
        assert rows["correct"][mine].sum() == (logits[0].argmax(1) == tokens[0, 1:]).sum()
        assert rows["copy_correct"][mine].sum() == (tokens[0, :-1] == tokens[0, 1:]).sum()
        assert rows["tokens"][mine].sum() == tokens[0, 1:].numel()


def test_more_clips_than_a_batch_give_the_same(files, tokenizer, model, monkeypatch):
    held_out = held_out_of(files, tokenizer, "all")
    together = teacher_forced.predict(held_out, evaluated(model), whole_clips(held_out))
    monkeypatch.setattr(teacher_forced, "BATCH", 2)
    apart = teacher_forced.predict(held_out, evaluated(model), whole_clips(held_out))
    for name in together:
        assert together[name].sum() == pytest.approx(apart[name].sum(), rel=1e-6)


def test_a_model_that_knows_the_rule_is_perfect(files, tokenizer):
    scores = Scores(0)
    held_out = held_out_of(files, tokenizer, "train")
    teacher_forced.measure(held_out, evaluated(Counter(TINY_WORLD, tokenizer)), SMALL, scores)
    assert scores.metrics["tf.bits_per_token"] == pytest.approx(0.0, abs=1e-6)
    assert scores.metrics["tf.accuracy"] == scores.metrics["tf.both.accuracy"] == 1.0
    assert scores.metrics["copy.tf.accuracy"] == 0.0


def test_teacher_forced_groups_frames_by_action(files, tokenizer, model, monkeypatch):
    """Only the frames that move are predicted wrongly; the other groups stay perfect."""
    held_out = held_out_of(files, tokenizer, "train")
    actions = np.zeros((59, 5), np.float32)
    actions[10:20, 3] = 1  # moves
    actions[20:40, 0] = 0.5  # turns
    actions[40:45, [0, 3]] = 1
    monkeypatch.setattr(held_out.clips, "actions", [actions])

    class WrongWhenWalking(Counter):
        def predict(self, tokens, actions, state, **given):
            self.stride = 2 if actions[0, 3] else 1
            return super().predict(tokens, actions, state, **given)

    scores = Scores(0)
    teacher_forced.measure(held_out, evaluated(WrongWhenWalking(TINY_WORLD, tokenizer)), SMALL, scores)
    kinds = {"still": (24, 1.0), "turn": (20, 1.0), "move": (10, 0.0), "both": (5, 0.0)}
    for kind, (frames, accuracy) in kinds.items():
        assert scores.metrics[f"tf.{kind}.frames"] == frames
        assert scores.metrics[f"tf.{kind}.accuracy"] == accuracy


def roll_out(world: EvaluatedModel, held_out: HeldOutClips, windows: list, monkeypatch) -> dict[str, float]:
    monkeypatch.setattr(held_out_clips, "spread_windows", lambda *_: np.array(windows))
    recorded = rollouts.read_windows(held_out, SMALL, NO_NETWORKS)
    scores = Scores(0)
    rollouts.measure(held_out, world, SMALL, NO_NETWORKS, recorded, scores)
    return scores.metrics


def test_a_perfect_rollout_and_a_wrong_one(files, tokenizer, monkeypatch):
    held_out = held_out_of(files, tokenizer, "train")
    right, wrong = Counter(TINY_WORLD, tokenizer), Counter(TINY_WORLD, tokenizer)
    wrong.stride = 2
    perfect = roll_out(evaluated(right), held_out, [(0, 3), (0, 20)], monkeypatch)
    for context in (1, 6, 16):
        for when in ("h1", "h4", "h8", "h16", "h20", "mean20"):
            key = f"rollout.ctx{context}.{when}"
            assert perfect[f"{key}.token_acc"] == 1.0
            assert perfect[f"{key}.psnr_tokens"] == pytest.approx(PSNR_CEILING)
            assert perfect[f"{key}.codes_ratio"] == 1.0
    assert perfect["rollout.ctx6.h8.ssim"] == perfect["rollout.ctx6.h8.edge_f1"] == 1.0
    assert perfect["copy.rollout.ctx6.h1.token_acc"] == 0.0
    assert perfect["copy.rollout.ctx6.h1.psnr_tokens"] < PSNR_CEILING
    failed = roll_out(evaluated(wrong), held_out, [(0, 3), (0, 20)], monkeypatch)
    assert failed["rollout.ctx6.h1.token_acc"] == failed["rollout.ctx6.mean20.token_acc"] == 0.0


def test_horizons_count_from_the_last_context_frame(files, tokenizer, monkeypatch):
    """A model that is wrong after 3 frames is right at horizon 1 and wrong at 4, from any context."""

    class WrongLater(Counter):
        def init_state(self, batch, device=None):
            self.steps = 0
            return super().init_state(batch, device)

        def logits(self, prediction, cells=None, trust=0.0):
            self.steps += 1
            self.stride = 1 if self.steps <= 3 else 2
            return super().logits(prediction)

    held_out = held_out_of(files, tokenizer, "train")
    found = roll_out(evaluated(WrongLater(TINY_WORLD, tokenizer)), held_out, [(0, 0)], monkeypatch)
    for context in SMALL.contexts:
        assert found[f"rollout.ctx{context}.h1.token_acc"] == 1.0
        assert found[f"rollout.ctx{context}.h4.token_acc"] == 0.0
        assert found[f"rollout.ctx{context}.mean20.token_acc"] == pytest.approx(3 / 20)


def test_the_copy_of_a_still_clip_is_perfect(files, model, tokenizer, monkeypatch):
    held_out = held_out_of(files, tokenizer, "val")
    assert held_out.clips.entries[2].name == "still"
    found = roll_out(evaluated(model), held_out, [(2, 5)], monkeypatch)
    assert found["copy.rollout.ctx1.mean20.token_acc"] == 1.0
    assert found["copy.rollout.ctx1.mean20.psnr_tokens"] == pytest.approx(PSNR_CEILING)
    assert found["rollout.ctx1.mean20.token_acc"] < 0.5
    assert not any("_frames" in key for key in found), "its video cannot be opened"


def test_rollouts_are_those_of_the_rollout_class(files, model, tokenizer, monkeypatch):
    """The same frames as a `Rollout` by hand: context 6 ends at frame 16 of the window, actions follow."""
    held_out = held_out_of(files, tokenizer, "val")
    tokens, actions, _ = held_out.clips.batch(np.array([(1, 2)]), 36)
    rollout = Rollout(model, SamplingConfig(greedy=True))
    rollout.prime(tokens[:, 10:16], actions[:, 10:15])
    generated = rollout.run(actions[:, 15:])
    found = roll_out(evaluated(model, SamplingConfig(greedy=True)), held_out, [(1, 2)], monkeypatch)
    for h in (1, 8, 20):
        with torch.no_grad():
            decoded = tokenizer.decode(generated[:, h - 1]), tokenizer.decode(tokens[:, 15 + h])
        assert found[f"rollout.ctx6.h{h}.psnr_tokens"] == pytest.approx(psnr(*decoded).item(), rel=1e-4)
        accuracy = (generated[:, h - 1] == tokens[:, 15 + h]).float().mean().item()
        assert found[f"rollout.ctx6.h{h}.token_acc"] == pytest.approx(accuracy)
        assert found[f"rollout.ctx6.h{h}.codes"] == len(set(generated[:, h - 1].flatten().tolist()))


def test_original_pictures_are_those_of_the_kept_frames(files, tokenizer):
    held_out = held_out_of(files, tokenizer, "val")
    windows = np.array([(1, 4), (2, 0), (0, 0), (1, 1)])
    frames = np.array([16, 17, 20])
    found = held_out.original_pictures(windows, frames)
    assert sorted(found) == [0, 2, 3], "none for the clip without a video"
    for n in found:
        clip, start = windows[n]
        video = list(read_frames(held_out.clips.directory / held_out.clips.entries[clip].video))
        expected = np.stack([video[2 * (start + i)] for i in frames])
        assert np.array_equal((found[n] * 255).round().byte().permute(0, 2, 3, 1).numpy(), expected)


def test_the_recording_row_is_the_decoded_truth(files, model, tokenizer, monkeypatch):
    held_out = held_out_of(files, tokenizer, "val")
    found = roll_out(evaluated(model), held_out, [(0, 3), (2, 3)], monkeypatch)
    original = held_out.original_pictures(np.array([(0, 3)]), np.arange(16, 36))[0]
    with torch.no_grad():
        decoded = tokenizer.decode(torch.from_numpy(held_out.clips.tokens[0][19:39].astype(np.int64)))
    expected = psnr(decoded, original)
    assert found["recording.rollout.ctx6.mean20.psnr_frames"] == pytest.approx(
        expected.mean().item(), rel=1e-4
    )
    assert found["recording.rollout.ctx6.h4.psnr_frames"] == pytest.approx(expected[3].item(), rel=1e-4)
    assert "copy.rollout.ctx16.h20.psnr_frames" in found and "rollout.ctx1.mean20.psnr_frames" in found


@pytest.mark.parametrize("count", [1, 2, 3, 7, 40])
def test_windows_are_spread_evenly_over_clips(count):
    lengths = [100, 20, 36, 500, 90]
    windows = spread_windows(lengths, 36, count, seed=0)
    assert windows.shape == (count, 2)
    for clip, start in windows:
        assert 0 <= start <= lengths[clip] - 36
    given = np.bincount(windows[:, 0], minlength=5)
    assert given[1] == 0, "too short"
    shares = given[[0, 2, 3, 4]]
    assert shares.max() - shares.min() <= 1
    long = windows[windows[:, 0] == 3, 1]
    assert (np.diff(long) > 0).all() and (len(long) < 4 or np.ptp(long) > 230), "and along each"
    assert np.array_equal(windows, spread_windows(lengths, 36, count, seed=0))


def test_windows_need_a_clip_that_is_long_enough():
    with pytest.raises(DataError, match="36 frames of a window .the longest has 35"):
        spread_windows([10, 35], 36, 4, seed=0)


@pytest.fixture(scope="module", autouse=True)
def tiny_plan(files):
    """The script at a tiny size, with an inverse-dynamics network for pictures of 32x16."""
    torch.manual_seed(0)
    config = inverse_dynamics.InverseDynamicsConfig(height=16, width=32)
    network = inverse_dynamics.InverseDynamics(config).eval()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(picture_networks, "EffNetDistance", PixelDistance)
        patch.setattr(evaluate, "FULL", SMALL)
        patch.setattr(evaluate, "QUICK", SMALL)
        patch.setattr(evaluate, "load_or_train", lambda *_, **__: (network, "untrained"))
        yield


@pytest.fixture(scope="module")
def run(files, tmp_path_factory) -> tuple[dict, Path]:
    """The JSON of a run of the script, and its path."""
    out = tmp_path_factory.mktemp("out") / "deep" / "world.json"
    assert evaluate.main(files.flags("--out", out, "--topk", 8)) == 0
    return json.loads(out.read_text()), out


def test_metrics_are_flat_and_complete(run):
    metrics = run[0]["metrics"]
    assert all(isinstance(value, float) and math.isfinite(value) for value in metrics.values())
    wanted = {"tf.bits_per_token", "tf.accuracy", "rotation.error_deg", "control.flow_ratio"}
    wanted |= {"control.delta_psnr", "long.collapse_frame", "long.fd_ratio", "long.codes_ratio"}
    wanted |= {f"control.pairs.{name}" for name in ("turn", "look", "forward_back", "strafe")}
    for name in ("yaw_deg", "pitch_deg", "move_x_f1", "move_z_f1", "jump_f1"):
        wanted |= {f"{source}control.idm.{name}" for source in ("", "original.", "recording.")}
    for angle in (30, 60, 90, 180):
        wanted |= {f"memory.deg{angle}.token_agreement", f"memory.deg{angle}.away_agreement"}
    wanted |= {f"tokenizer.{name}" for name in ("psnr", "ssim", "perceptual", "used_codes", "perplexity")}
    for source in ("", "copy.", "rot.", "geo."):
        for context in (1, 6, 16):
            for when in ("h1", "h4", "h8", "h16", "h20"):
                names = "psnr_tokens psnr_frames ssim perceptual token_acc codes_ratio edge_f1"
                wanted |= {f"{source}rollout.ctx{context}.{when}.{name}" for name in names.split()}
    wanted |= {f"{source}.depth.h{h}.psnr" for source in ("copy", "rot", "geo") for h in (1, 20)}
    assert wanted - metrics.keys() == set()
    assert metrics["copy.rollout.ctx1.h8.psnr_tokens"] == metrics["copy.rollout.ctx16.h8.psnr_tokens"]
    for key, (low, high) in run[0]["ci95"].items():
        assert low <= metrics[key] + 1e-9 and metrics[key] - 1e-9 <= high, key


def test_meta_describes_the_run(run, files):
    meta = run[0]["meta"]
    assert meta["checkpoint"] == "world.pt" and meta["step"] == 12
    assert meta["parameters"] == sum(p.numel() for p in ConvGRUWorldModel(TINY_WORLD).parameters())
    assert meta["split"] == "val" and meta["clips"] == ["counting", "random", "still"]
    assert meta["sampling"] == {**vars(PLAY), "top_k": 8}
    assert meta["plan"]["windows"] == 4 and meta["seed"] == 0
    assert {"data", "command", "commit", "machine"} <= meta.keys()
    text = json.dumps(run[0])
    for private in (str(files.tokens.parent), str(provenance.ROOT), str(Path.home()) + "/"):
        assert private not in text


def test_pictures_are_drawn(run):
    folder = run[1].with_suffix("")
    assert {path.name for path in folder.iterdir()} == {
        "horizons.png", "rollouts.png", "rollouts.mp4", "control.png", "memory_long.png",
        f"commands_{run[0]['meta']['name']}.png", f"memory_{run[0]['meta']['name']}.png",
        f"long_{run[0]['meta']['name']}.png", f"long_{run[0]['meta']['name']}.mp4",
    }  # fmt: skip
    frames = list(read_frames(folder / "rollouts.mp4"))
    assert len(frames) == 21 * 4, "the last context frame and 20 more of each window"


def test_the_same_seed_gives_the_same_numbers(run, files, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.pictures, "draw", lambda *_: [])
    numbers = {}
    for seed, sections in ((0, evaluate.SECTIONS), (1, ("teacher_forced", "rollouts"))):
        out = tmp_path / f"{seed}.json"
        evaluate.main(files.flags("--out", out, "--topk", 8, "--seed", seed, "--only", *sections))
        numbers[seed] = json.loads(out.read_text())["metrics"]
    assert numbers[0] == run[0]["metrics"]
    changed = {key for key, value in numbers[1].items() if value != numbers[0].get(key)}
    assert "rollout.ctx6.mean20.token_acc" in changed
    assert "tf.bits_per_token" not in changed, "nothing is sampled here"


def test_several_checkpoints_in_one_table(files, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "QUICK", dataclasses.replace(SMALL, windows=2, contexts=(1, 6)))
    content = checkpoint.load(files.world)
    checkpoint.save(tmp_path / "other.pt", content)
    flags = files.flags("--quick", "--split", "all", "--greedy", "--only", "teacher_forced", "rollouts")
    flags[1:2] = [str(files.world), str(tmp_path / "other.pt")]
    evaluate.main(flags)
    printed = capsys.readouterr().out
    (written,) = (tmp_path / "outputs" / "eval").glob("*.json")
    result = json.loads(written.read_text())
    name = result["meta"]["name"]
    (other,) = result["others"]
    assert (
        name.endswith("_world") and other.endswith("_other") and written.name == f"{name}_{other}_quick.json"
    )
    assert result["others"][other]["metrics"] == result["metrics"], "it is the same model"
    bits = f"{result['metrics']['tf.bits_per_token']:.2f}"
    line = next(line for line in printed.splitlines() if line.startswith("| bits per token"))
    assert [cell.split()[0] for cell in line.split("|")[2:4]] == [bits, bits]
    block = printed[printed.index("| Token accuracy") :]
    row = next(line for line in block.splitlines() if line.startswith(f"| {name}, context 6"))
    cells = [cell.strip() for cell in row.split("|")[2:-1]]
    expected = [f"rollout.ctx6.{h}.token_acc" for h in ("h1", "h4", "h8", "h16", "h20", "mean20")]
    assert cells == [f"{result['metrics'][key]:.3f}" for key in expected]
    assert "greedy" in printed and not any(key.startswith("long") for key in result["metrics"])
    for block in printed.split("\n\n"):
        widths = {line.count("|") for line in block.splitlines() if line.startswith("|")}
        assert len(widths) <= 1, "every table is a table"


def test_quick_evaluates_fewer_clips(files, monkeypatch, tmp_path):
    monkeypatch.setattr(evaluate, "QUICK", dataclasses.replace(SMALL, windows=2))
    evaluate.main(files.flags("--quick", "--only", "teacher_forced", "--out", tmp_path / "a.json"))
    meta = json.loads((tmp_path / "a.json").read_text())["meta"]
    assert meta["clips"] == ["counting", "still"] and meta["quick"]
    assert meta["plan"]["walk_starts"] == SMALL.walk_starts


def test_the_walks_have_flags_of_their_own(files):
    config = evaluate.parse_config(files.flags("--walk_starts", 7, "--walk_seconds", 3))
    assert (config.plan.walk_starts, config.plan.walk_seconds) == (7, 3)
    assert dataclasses.replace(config.plan, walk_starts=2, walk_seconds=2) == SMALL


def test_an_inverse_dynamics_network_is_trained_unless_the_shipped_one_is_asked_for(files):
    for flags, trains in (((), True), (("--shipped_idm",), False), (("--quick",), False)):
        assert evaluate.parse_config(files.flags(*flags)).train_inverse_dynamics == trains


def test_help_lists_every_flag(capsys):
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(["--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    for flag in "--checkpoint --vqvae_ckpt --data_dir --split --out --quick --seed --only".split():
        assert flag in printed


def refused(files: Files, capsys, *more: object) -> str:
    assert evaluate.main(files.flags(*more)) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    return message


@pytest.mark.parametrize(
    "more, expected",
    [
        (("--checkpoint", "none.pt"), "none.pt: no such checkpoint"),
        (("--data_dir", "nowhere"), "nowhere/manifest.json: no manifest"),
    ],
)
def test_wrong_flags_are_refused_in_one_line(files, capsys, more, expected):
    assert expected in refused(files, capsys, *more)


@pytest.mark.parametrize("value", [0, 2])
def test_values_of_flags_have_a_range(files, capsys, value):
    with pytest.raises(SystemExit):
        evaluate.main(files.flags("--topp", value))
    assert f"argument --topp: {value}: expected a number, above 0 and at most 1" in capsys.readouterr().err


def test_tokens_of_another_tokenizer_are_refused(files, capsys, tmp_path):
    other = tmp_path / "other.pt"
    checkpoint.save(other, tokenizer_content(tiny_vqvae(seed=5)))
    assert "--vqvae_ckpt" in refused(files, capsys, "--vqvae_ckpt", other), "the world model is checked first"
    content = checkpoint.load(files.world)
    content["tokenizer"] = load_tokenizer(other).fingerprint
    checkpoint.save(tmp_path / "world.pt", content)
    message = refused(files, capsys, "--vqvae_ckpt", other, "--checkpoint", tmp_path / "world.pt")
    assert "manifest.json" in message and content["tokenizer"] in message


def test_tokens_at_another_frame_rate_are_refused(files, capsys, tmp_path):
    content = checkpoint.load(files.world)
    content["data"]["fps"] = 8.0
    checkpoint.save(tmp_path / "slow.pt", content)
    message = refused(files, capsys, "--checkpoint", tmp_path / "slow.pt")
    assert "fps is 16" in message and "trained at 8" in message


def test_the_json_file_and_the_folder_of_pictures_have_different_names():
    assert evaluate.json_file(Path("a/b")) == evaluate.json_file(Path("a/b.json")) == Path("a/b.json")
    with pytest.raises(SettingError, match="--out b.txt: expected a name that ends in .json"):
        evaluate.json_file(Path("b.txt"))


def test_a_share_of_a_full_run_keeps_what_is_measured():
    full = Plan()
    quarter = full.scaled(0.25)
    assert (quarter.windows, quarter.still_starts, quarter.look_aways) == (16, 4, 4)
    assert (quarter.horizons, quarter.long_frames) == (full.horizons, full.long_frames)
    assert full.scaled(1.0) == full and full.scaled(0.001).look_aways == 1
    assert evaluate.parse_config(["--share", "0.5"]).plan == evaluate.FULL.scaled(0.5)
    for share in ("0", "1.5", "nan"):
        with pytest.raises(SystemExit):
            evaluate.parse_config(["--share", share])
