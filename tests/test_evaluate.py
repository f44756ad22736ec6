"""evaluate.py: tokens of worlds whose answers are known, and the script run at a tiny size.

What it measures on pictures is tested in test_evaluation.py.
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
from evaluation import held_out_clips, inverse_dynamics, rollouts, teacher_forced
from evaluation.aggregate import Scores
from evaluation.held_out_clips import HeldOutClips, Judges, Plan, Subject, spread_windows
from metrics import PSNR_CEILING, psnr
from model_convGru import ConvGRUWorldModel, Prediction
from rollout.rollout import Rollout
from rollout.sampling import PLAY, SamplingConfig
from rollout.world_model import load_world_model, world_content
from runtime import checkpoint, provenance
from runtime.video import read_frames, write_video
from vq_vae.tokenizer import load_tokenizer, tokenizer_content

CODES = TINY_WORLD.codebook_size
SMALL = Plan(
    contexts=(1, 6, 16), horizons=(1, 4, 8, 16, 20), windows=4, teacher_forced=10_000, starts=2, still=2,
    memory=2, recorded=2, streams=2, life=128,
)  # fmt: skip
NOBODY = Judges({}, torch.nn.Identity(), None)


@dataclass(frozen=True)
class Files:
    """Where the test's files lie."""

    tokenizer: Path
    world: Path
    tokens: Path

    def flags(self, *more: object) -> list[str]:
        """A command line that names them."""
        given = ("--checkpoint", self.world, "--vqvae_ckpt", self.tokenizer, "--data_dir", self.tokens)
        return [str(word) for word in (*given, "--device", "cpu", *more)]


def write_clip(folder: Path, name: str, tokens: np.ndarray, split: str, kept: list[int]) -> ClipEntry:
    frames = len(tokens)
    actions = np.random.default_rng(frames).uniform(-1, 1, (frames - 1, 5))
    write_token_file(folder / f"{name}.npz", tokens, actions, np.zeros((frames, 5)))
    return ClipEntry(name, f"{name}.npz", frames, split, f"../video/{name}.mp4", kept)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Files:
    """Three held-out clips and one to train on.

    `counting` adds 1 to every token from frame to frame, `still` never changes. Those of `counting` and
    `random` can be opened: their 40 frames are every second one of a video of 79.
    """
    root = tmp_path_factory.mktemp("eval")
    checkpoint.save(root / "vqvae.pt", tokenizer_content(tiny_vqvae()))
    tokenizer = load_tokenizer(root / "vqvae.pt")
    torch.manual_seed(1)
    content = world_content(
        ConvGRUWorldModel(TINY_WORLD),
        tokenizer.fingerprint,
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
        # The video frame's number is its brightness, so that a frame taken from the wrong place shows.
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
    """Is certain that every token grows by `stride`."""

    stride = 1

    def predict(self, tokens, actions, state, observed=True, picture=None, pose=None):
        return Prediction(tokens), state

    def logits(self, prediction, trust=None):
        wanted = (prediction.features + self.stride) % CODES
        return 50.0 * F.one_hot(wanted, CODES).movedim(-1, 1).float()


def subject(model: ConvGRUWorldModel, tokenizer, sampling: SamplingConfig | None = None) -> Subject:
    return Subject(
        "world", Path("world.pt"), model, {}, tokenizer, sampling or SamplingConfig(), 0, torch.float32
    )


def held_clips(files: Files, tokenizer, split: str) -> HeldOutClips:
    return HeldOutClips(TokenClips(files.tokens, split), tokenizer, seed=0)


def test_a_dream_is_the_same_whether_or_not_its_context_was_kept(files, tokenizer):
    """`Subject.rollout` primes once for several commands; another context, or another pose, primes anew."""
    held = held_clips(files, tokenizer, "all")
    torch.manual_seed(1)
    world = subject(ConvGRUWorldModel(TINY_WORLD), tokenizer)
    windows = held.windows(9, 20)  # more than one batch
    seen, actions = held.batch(windows, 9)
    pose = held.pose(windows, 5)
    ways = [(seen[:, :5], actions, pose), (seen[:, :5], -actions, pose), (seen[:, 1:6], actions, pose)]
    ways[1][1][:, :4] = actions[:, :4]  # the same until the rollout begins
    kept = [world.rollout(*way, "rollout") for way in (*ways, ways[0])]
    for way, tokens in zip((*ways, ways[0]), kept, strict=True):
        world.kept.clear()
        assert torch.equal(world.rollout(*way, "rollout"), tokens)
    assert not torch.equal(kept[0], kept[2])


# ---------------------------------------------------------------- teacher-forced


def whole(held: HeldOutClips) -> list[tuple[int, int, int]]:
    return teacher_forced.stretches(held.lengths, 10_000)


def test_teacher_forced_is_the_cross_entropy_of_each_whole_clip(files, tokenizer, model):
    held = held_clips(files, tokenizer, "all")
    rows = teacher_forced.predict(held, subject(model, tokenizer), whole(held))
    for i in range(4):
        tokens = torch.from_numpy(held.clips.tokens[i].astype(np.int64))[None]
        with torch.no_grad():
            logits, _ = model(tokens[:, :-1], torch.from_numpy(held.clips.actions[i])[None])
        mine = rows["clip"] == i
        nats = F.cross_entropy(logits[0], tokens[0, 1:], reduction="sum").item()
        assert rows["nats"][mine].sum() == pytest.approx(nats, rel=1e-5), "clips do not get mixed up"
        assert rows["right"][mine].sum() == (logits[0].argmax(1) == tokens[0, 1:]).sum()
        assert rows["copied"][mine].sum() == (tokens[0, :-1] == tokens[0, 1:]).sum()
        assert rows["tokens"][mine].sum() == tokens[0, 1:].numel()


def test_more_clips_than_a_batch_give_the_same(files, tokenizer, model, monkeypatch):
    held = held_clips(files, tokenizer, "all")
    together = teacher_forced.predict(held, subject(model, tokenizer), whole(held))
    monkeypatch.setattr(teacher_forced, "BATCH", 2)
    apart = teacher_forced.predict(held, subject(model, tokenizer), whole(held))
    for name in together:
        assert together[name].sum() == pytest.approx(apart[name].sum(), rel=1e-6)


def test_a_world_that_knows_the_rule_scores_perfect(files, tokenizer):
    scores = Scores(0)
    held = held_clips(files, tokenizer, "train")
    teacher_forced.measure(held, subject(Counter(TINY_WORLD), tokenizer), SMALL, scores)
    assert scores.metrics["tf.bits_per_token"] == pytest.approx(0.0, abs=1e-6)
    assert scores.metrics["tf.accuracy"] == scores.metrics["tf.both.accuracy"] == 1.0
    assert scores.metrics["copy.tf.accuracy"] == 0.0


def test_frames_are_told_apart_by_what_is_done(files, tokenizer, model, monkeypatch):
    """The walking frames are predicted wrongly: the others do not suffer for it."""
    held = held_clips(files, tokenizer, "train")
    actions = np.zeros((59, 5), np.float32)
    actions[10:20, 3] = 1  # moves
    actions[20:40, 0] = 0.5  # turns
    actions[40:45, [0, 3]] = 1
    monkeypatch.setattr(held.clips, "actions", [actions])

    class WrongAtAWalk(Counter):
        def predict(self, tokens, actions, state, **seen):
            self.stride = 2 if actions[0, 3] else 1
            return super().predict(tokens, actions, state, **seen)

    scores = Scores(0)
    teacher_forced.measure(held, subject(WrongAtAWalk(TINY_WORLD), tokenizer), SMALL, scores)
    kinds = {"still": (24, 1.0), "turn": (20, 1.0), "move": (10, 0.0), "both": (5, 0.0)}
    for kind, (frames, accuracy) in kinds.items():
        assert scores.metrics[f"tf.{kind}.frames"] == frames
        assert scores.metrics[f"tf.{kind}.accuracy"] == accuracy


# ---------------------------------------------------------------- free-running


def run_free(world: Subject, held: HeldOutClips, windows: list, monkeypatch) -> dict[str, float]:
    monkeypatch.setattr(held_out_clips, "spread_windows", lambda *_: np.array(windows))
    recorded = rollouts.record(held, SMALL, NOBODY)
    scores = Scores(0)
    rollouts.measure(held, world, SMALL, NOBODY, recorded, scores)
    return scores.metrics


def test_a_perfect_dream_and_a_wrong_one(files, tokenizer, monkeypatch):
    held = held_clips(files, tokenizer, "train")
    right, wrong = Counter(TINY_WORLD), Counter(TINY_WORLD)
    wrong.stride = 2
    perfect = run_free(subject(right, tokenizer), held, [(0, 3), (0, 20)], monkeypatch)
    for context in (1, 6, 16):
        for when in ("h1", "h4", "h8", "h16", "h20", "mean20"):
            key = f"rollout.ctx{context}.{when}"
            assert perfect[f"{key}.token_acc"] == 1.0
            assert perfect[f"{key}.psnr_tokens"] == pytest.approx(PSNR_CEILING)
            assert perfect[f"{key}.codes_ratio"] == 1.0
    assert perfect["rollout.ctx6.h8.ssim"] == perfect["rollout.ctx6.h8.edge_f1"] == 1.0
    assert perfect["copy.ctx6.h1.token_acc"] == 0.0
    assert perfect["copy.ctx6.h1.psnr_tokens"] < PSNR_CEILING
    failed = run_free(subject(wrong, tokenizer), held, [(0, 3), (0, 20)], monkeypatch)
    assert failed["rollout.ctx6.h1.token_acc"] == failed["rollout.ctx6.mean20.token_acc"] == 0.0


def test_horizons_count_from_the_last_frame_seen(files, tokenizer, monkeypatch):
    """A world that counts wrongly after 3 frames is right at horizon 1 and wrong at 4, from any context."""

    class Tires(Counter):
        def init_state(self, batch, device=None):
            self.steps = 0
            return super().init_state(batch, device)

        def logits(self, prediction, trust=None):
            self.steps += 1
            self.stride = 1 if self.steps <= 3 else 2
            return super().logits(prediction)

    held = held_clips(files, tokenizer, "train")
    found = run_free(subject(Tires(TINY_WORLD), tokenizer), held, [(0, 0)], monkeypatch)
    for context in SMALL.contexts:
        assert found[f"rollout.ctx{context}.h1.token_acc"] == 1.0
        assert found[f"rollout.ctx{context}.h4.token_acc"] == 0.0
        assert found[f"rollout.ctx{context}.mean20.token_acc"] == pytest.approx(3 / 20)


def test_copying_a_still_clip_is_perfect(files, model, tokenizer, monkeypatch):
    held = held_clips(files, tokenizer, "val")
    assert held.clips.entries[2].name == "still"
    found = run_free(subject(model, tokenizer), held, [(2, 5)], monkeypatch)
    assert found["copy.ctx1.mean20.token_acc"] == 1.0
    assert found["copy.ctx1.mean20.psnr_tokens"] == pytest.approx(PSNR_CEILING)
    assert found["rollout.ctx1.mean20.token_acc"] < 0.5
    assert not any("_frames" in key for key in found), "its video cannot be opened"


def test_rollouts_are_the_dream_of_play(files, model, tokenizer, monkeypatch):
    """The same frames as a Rollout by hand: context 6 ends at frame 16 of the window, actions follow."""
    held = held_clips(files, tokenizer, "val")
    tokens, actions = held.clips.batch(np.array([(1, 2)]), 35)
    rollout = Rollout(model, SamplingConfig(greedy=True))
    rollout.prime(tokens[:, 10:16], actions[:, 10:15])
    made = rollout.run(actions[:, 15:])
    found = run_free(subject(model, tokenizer, SamplingConfig(greedy=True)), held, [(1, 2)], monkeypatch)
    for h in (1, 8, 20):
        with torch.no_grad():
            decoded = tokenizer.decode(made[:, h - 1]), tokenizer.decode(tokens[:, 15 + h])
        assert found[f"rollout.ctx6.h{h}.psnr_tokens"] == pytest.approx(psnr(*decoded).item(), rel=1e-4)
        accuracy = (made[:, h - 1] == tokens[:, 15 + h]).float().mean().item()
        assert found[f"rollout.ctx6.h{h}.token_acc"] == pytest.approx(accuracy)
        assert found[f"rollout.ctx6.h{h}.codes"] == len(set(made[:, h - 1].flatten().tolist()))


# ---------------------------------------------------------------- true pictures


def test_true_pictures_are_those_of_the_kept_frames(files, tokenizer):
    held = held_clips(files, tokenizer, "val")
    windows = np.array([(1, 4), (2, 0), (0, 0), (1, 1)])
    frames = np.array([16, 17, 20])
    found = dict(held.true_pictures(windows, frames))
    assert sorted(found) == [0, 2, 3], "none for the clip whose video is not there"
    for n in found:
        clip, start = windows[n]
        video = list(read_frames(held.clips.directory / held.clips.entries[clip].video))
        expected = np.stack([video[2 * (start + i)] for i in frames])
        assert np.array_equal((found[n] * 255).round().byte().permute(0, 2, 3, 1).numpy(), expected)


def test_the_ceiling_is_the_decoded_truth(files, model, tokenizer, monkeypatch):
    held = held_clips(files, tokenizer, "val")
    found = run_free(subject(model, tokenizer), held, [(0, 3), (2, 3)], monkeypatch)
    real = dict(held.true_pictures(np.array([(0, 3)]), np.arange(16, 36)))[0]
    with torch.no_grad():
        made = tokenizer.decode(torch.from_numpy(held.clips.tokens[0][19:39].astype(np.int64)))
    expected = psnr(made, real)
    assert found["ceiling.ctx6.mean20.psnr_frames"] == pytest.approx(expected.mean().item(), rel=1e-4)
    assert found["ceiling.ctx6.h4.psnr_frames"] == pytest.approx(expected[3].item(), rel=1e-4)
    assert "copy.ctx16.h20.psnr_frames" in found and "rollout.ctx1.mean20.psnr_frames" in found


# ---------------------------------------------------------------- windows


@pytest.mark.parametrize("count", [1, 2, 3, 7, 40])
def test_windows_are_spread_over_clips(count):
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


# ---------------------------------------------------------------- the script


@pytest.fixture(scope="module", autouse=True)
def tiny_plan(files):
    """The script at a tiny size, and an inverse-dynamics network for pictures of 32x16."""
    torch.manual_seed(0)
    config = inverse_dynamics.InverseDynamicsConfig(height=16, width=32)
    network = inverse_dynamics.InverseDynamics(config).eval()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "EffNetDistance", PixelDistance)
        patch.setattr(evaluate, "Plan", lambda: SMALL)
        patch.setattr(evaluate, "QUICK", SMALL)
        patch.setattr(evaluate, "load_or_train", lambda *_, **__: (network, "made up for the test"))
        yield


@pytest.fixture(scope="module")
def run(files, tmp_path_factory) -> tuple[dict, Path]:
    """What a run of the script writes, and where."""
    out = tmp_path_factory.mktemp("out") / "deep" / "world.json"
    evaluate.main(files.flags("--out", out, "--topk", 8))
    return json.loads(out.read_text()), out


def test_metrics_are_flat_and_complete(run):
    metrics = run[0]["metrics"]
    assert all(isinstance(value, float) and math.isfinite(value) for value in metrics.values())
    wanted = {"tf.bits_per_token", "tf.accuracy", "obey.rotation_deg_median", "obey.flow_ratio"}
    wanted |= {"obey.delta_psnr", "life.collapse_frame", "life.fd_ratio", "life.codes_ratio"}
    wanted |= {f"obey.pairs.{name}" for name in ("turn", "look", "forward_back", "strafe")}
    for name in ("yaw_deg", "pitch_deg", "move_x_f1", "move_z_f1", "jump_f1"):
        wanted |= {f"obey.idm.{name}", f"obey.idm.{name}.real", f"obey.idm.{name}.decoded"}
    for angle in (30, 60, 90, 180):
        wanted |= {f"memory.deg{angle}.token_agreement", f"memory.deg{angle}.away_agreement"}
    wanted |= {f"tokenizer.{name}" for name in ("psnr", "ssim", "perceptual", "used_codes", "perplexity")}
    for row in ("rollout", "copy", "rot", "geo"):
        for context in (1, 6, 16):
            for when in ("h1", "h4", "h8", "h16", "h20"):
                names = "psnr_tokens psnr_frames ssim perceptual token_acc codes_ratio edge_f1"
                wanted |= {f"{row}.ctx{context}.{when}.{name}" for name in names.split()}
    assert wanted - metrics.keys() == set()
    assert metrics["copy.ctx1.h8.psnr_tokens"] == metrics["copy.ctx16.h8.psnr_tokens"]
    for key, (low, high) in run[0]["ci95"].items():
        assert low <= metrics[key] + 1e-9 and metrics[key] - 1e-9 <= high, key


def test_meta_says_where_the_numbers_come_from(run, files):
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
        "horizons.png", "rollouts.png", "rollouts.mp4", "obedience.png", "memory_life.png",
        f"commands_{run[0]['meta']['name']}.png", f"memory_{run[0]['meta']['name']}.png",
        f"life_{run[0]['meta']['name']}.png", f"life_{run[0]['meta']['name']}.mp4",
    }  # fmt: skip
    frames = list(read_frames(folder / "rollouts.mp4"))
    assert len(frames) == 21 * 4, "20 frames from the last one seen, of each window"


def test_the_same_seed_gives_the_same_numbers(run, files, tmp_path):
    numbers = {}
    for seed in (0, 1):
        out = tmp_path / f"{seed}.json"
        evaluate.main(files.flags("--out", out, "--topk", 8, "--seed", seed))
        numbers[seed] = json.loads(out.read_text())["metrics"]
    assert numbers[0] == run[0]["metrics"]
    assert numbers[1] != numbers[0]
    assert numbers[1]["tf.bits_per_token"] == numbers[0]["tf.bits_per_token"], "no chance is involved here"


def test_worlds_stand_side_by_side(files, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = checkpoint.load(files.world)
    checkpoint.save(tmp_path / "other.pt", content)
    flags = files.flags("--quick", "--split", "all", "--greedy", "--only", "teacher_forced", "rollouts")
    flags[1:2] = [str(files.world), str(tmp_path / "other.pt")]
    evaluate.main(flags)
    said = capsys.readouterr().out
    (written,) = (tmp_path / "outputs" / "eval").glob("*.json")
    result = json.loads(written.read_text())
    name = result["meta"]["name"]
    (other,) = result["others"]
    assert (
        name.endswith("_world") and other.endswith("_other") and written.name == f"{name}_{other}_quick.json"
    )
    assert result["others"][other]["metrics"] == result["metrics"], "it is the same world"
    bits = f"{result['metrics']['tf.bits_per_token']:.2f}"
    line = next(line for line in said.splitlines() if line.startswith("| bits per token"))
    assert [cell.split()[0] for cell in line.split("|")[2:4]] == [bits, bits]
    block = said[said.index("| Token accuracy") :]
    row = next(line for line in block.splitlines() if line.startswith(f"| {name}, 6 seen"))
    cells = [cell.strip() for cell in row.split("|")[2:-1]]
    expected = [f"rollout.ctx6.{h}.token_acc" for h in ("h1", "h4", "h8", "h16", "h20", "mean20")]
    assert cells == [f"{result['metrics'][key]:.3f}" for key in expected]
    assert "greedy" in said and not any(key.startswith("life") for key in result["metrics"])
    for block in said.split("\n\n"):
        widths = {line.count("|") for line in block.splitlines() if line.startswith("|")}
        assert len(widths) <= 1, "every table is a table"


def test_quick_takes_fewer_clips(files, monkeypatch, tmp_path):
    monkeypatch.setattr(evaluate, "QUICK", dataclasses.replace(SMALL, windows=2))
    evaluate.main(files.flags("--quick", "--only", "teacher_forced", "--out", tmp_path / "a.json"))
    meta = json.loads((tmp_path / "a.json").read_text())["meta"]
    assert meta["clips"] == ["counting", "still"] and meta["quick"]


def test_help_says_every_flag(capsys):
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(["--help"])
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    for flag in (
        "--checkpoint",
        "--vqvae_ckpt",
        "--data_dir",
        "--split",
        "--out",
        "--quick",
        "--seed",
        "--only",
    ):
        assert flag in said


def refused(files: Files, capsys, *more: object) -> str:
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(files.flags(*more))
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    return message


@pytest.mark.parametrize(
    "more, told",
    [
        (("--checkpoint", "none.pt"), "none.pt: no such checkpoint"),
        (("--data_dir", "nowhere"), "nowhere/manifest.json: no manifest"),
        (("--topp", 0), "top_p 0"),
        (("--topp", 2), "top_p 2"),
    ],
)
def test_wrong_words_are_refused_in_one_line(files, capsys, more, told):
    assert told in refused(files, capsys, *more)


def test_tokens_of_another_tokenizer_are_refused(files, capsys, tmp_path):
    other = tmp_path / "other.pt"
    checkpoint.save(other, tokenizer_content(tiny_vqvae(seed=5)))
    assert "--vqvae_ckpt" in refused(files, capsys, "--vqvae_ckpt", other), "the world minds first"
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
