"""evaluate.py: its numbers against worlds whose answers are known, and the script run at a tiny size."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_WORLD, tiny_tokenizer

import checkpoint
import evaluate
from data import ClipEntry, DataError, Manifest, TokenClips, write_token_file
from metrics import PSNR_CEILING, psnr
from model_convGru import ConvGRUWorldModel
from sampling import PLAY_TEMPERATURE, Choice, Dream
from video import read_frames, write_video

CODES = TINY_WORLD.codebook_size
CPU = torch.device("cpu")


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
    checkpoint.save(root / "vqvae.pt", checkpoint.tokenizer_content(tiny_tokenizer()))
    tokenizer = checkpoint.load_tokenizer(root / "vqvae.pt")
    torch.manual_seed(1)
    content = checkpoint.world_content(
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
    return checkpoint.load_tokenizer(files.tokenizer)


@pytest.fixture(scope="module")
def model(files, tokenizer) -> ConvGRUWorldModel:
    return checkpoint.load_world_model(files.world, tokenizer)[0]


class Counter(ConvGRUWorldModel):
    """Is certain that every token grows by `stride`."""

    stride = 1

    def step(self, tokens, actions, state=None):
        wanted = (tokens + self.stride) % CODES
        return 50.0 * F.one_hot(wanted, CODES).movedim(-1, 1).float(), state


# ---------------------------------------------------------------- teacher-forced


def test_teacher_forced_is_the_cross_entropy_of_each_whole_clip(files, model):
    clips = TokenClips(files.tokens, "all")
    sums = evaluate.teacher_forced(model, clips, [0, 1, 2, 3], CPU)
    for i in range(4):
        tokens = torch.from_numpy(clips.tokens[i].astype(np.int64))[None]
        with torch.no_grad():
            logits, _ = model(tokens[:, :-1], torch.from_numpy(clips.actions[i])[None])
        nats = F.cross_entropy(logits[0], tokens[0, 1:], reduction="sum").item()
        assert sums["nats"][i] == pytest.approx(nats, rel=1e-5), "clips of other lengths do not get mixed up"
        assert sums["right"][i] == (logits[0].argmax(1) == tokens[0, 1:]).sum()
        assert sums["copied"][i] == (tokens[0, :-1] == tokens[0, 1:]).sum()
        assert sums["tokens"][i] == tokens[0, 1:].numel()


def test_more_clips_than_a_batch_give_the_same(files, model, monkeypatch):
    clips = TokenClips(files.tokens, "all")
    together = evaluate.teacher_forced(model, clips, [3, 0, 2], CPU)
    monkeypatch.setattr(evaluate, "BATCH", 2)
    apart = evaluate.teacher_forced(model, clips, [3, 0, 2], CPU)
    for name in together:
        assert together[name] == pytest.approx(apart[name], rel=1e-6)


def test_a_world_that_knows_the_rule_scores_perfect(files):
    clips = TokenClips(files.tokens, "train")
    sums = evaluate.teacher_forced(Counter(TINY_WORLD), clips, [0], CPU)
    metrics, _ = evaluate.teacher_forced_metrics(sums, seed=0)
    assert metrics["tf.bits_per_token"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["tf.accuracy"] == 1.0
    assert metrics["copy.tf.accuracy"] == 0.0


# ---------------------------------------------------------------- free-running


def run_free(model, tokenizer, clips: TokenClips, windows: list, choice: Choice) -> dict[str, float]:
    windows = np.array(windows)
    rows = evaluate.free_running(model, tokenizer, clips, windows, choice, seed=0, device=CPU)
    return evaluate.rollout_metrics(rows, windows[:, 0], seed=0)[0]


def test_a_perfect_dream_and_a_wrong_one(files, tokenizer):
    clips = TokenClips(files.tokens, "train")
    right, wrong = Counter(TINY_WORLD), Counter(TINY_WORLD)
    wrong.stride = 2
    perfect = run_free(right, tokenizer, clips, [(0, 3), (0, 20)], Choice())
    for context in (1, 6, 16):
        for when in ("h1", "h4", "h8", "h16", "h20", "mean20"):
            key = f"rollout.ctx{context}.{when}"
            assert perfect[f"{key}.token_acc"] == 1.0
            assert perfect[f"{key}.psnr_tokens"] == pytest.approx(PSNR_CEILING)
            assert perfect[f"{key}.codes_ratio"] == 1.0
    assert perfect["copy.ctx6.h1.token_acc"] == 0.0
    assert perfect["copy.ctx6.h1.psnr_tokens"] < PSNR_CEILING
    failed = run_free(wrong, tokenizer, clips, [(0, 3), (0, 20)], Choice())
    assert failed["rollout.ctx6.h1.token_acc"] == failed["rollout.ctx6.mean20.token_acc"] == 0.0


def test_horizons_count_from_the_last_frame_seen(files, tokenizer):
    """A world that counts wrongly after 3 frames is right at horizon 1 and wrong at 4, from any context."""

    class Tires(Counter):
        def init_state(self, batch, device=None):
            self.steps = 0
            return super().init_state(batch, device)

        def step(self, tokens, actions, state=None):
            self.steps += 1
            self.stride = 1 if self.steps <= 3 else 2
            return super().step(tokens, actions, state)

    clips = TokenClips(files.tokens, "train")
    windows = np.array([(0, 0)])
    rows = evaluate.free_running(Tires(TINY_WORLD), tokenizer, clips, windows, Choice(), 0, CPU)
    for context in evaluate.CONTEXTS:
        assert rows[f"rollout.ctx{context}"]["token_acc"][0].tolist() == [1.0] * 3 + [0.0] * 17


def test_copying_a_still_clip_is_perfect(files, model, tokenizer):
    clips = TokenClips(files.tokens, "val")
    assert clips.entries[2].name == "still"
    metrics = run_free(model, tokenizer, clips, [(2, 5)], Choice())
    assert metrics["copy.ctx1.mean20.token_acc"] == 1.0
    assert metrics["copy.ctx1.mean20.psnr_tokens"] == pytest.approx(PSNR_CEILING)
    assert metrics["rollout.ctx1.mean20.token_acc"] < 0.5
    assert not any("psnr_frames" in key for key in metrics), "its video cannot be opened"


def test_rollouts_are_the_dream_of_play(files, model, tokenizer):
    """The same frames as a Dream by hand: context 6 ends at frame 16 of the window, actions follow."""
    clips = TokenClips(files.tokens, "val")
    tokens, actions = clips.batch(np.array([(1, 2)]), 35)
    dream = Dream(model, tokenizer, Choice(greedy=True))
    dream.prime(tokens[:, 10:16], actions[:, 10:15])
    made = dream.rollout(actions[:, 15:])
    metrics = run_free(model, tokenizer, clips, [(1, 2)], Choice(greedy=True))
    for h in (1, 8, 20):
        with torch.no_grad():
            decoded = tokenizer.decode_code(made[:, h - 1]), tokenizer.decode_code(tokens[:, 15 + h])
        assert metrics[f"rollout.ctx6.h{h}.psnr_tokens"] == pytest.approx(psnr(*decoded).item(), rel=1e-5)
        accuracy = (made[:, h - 1] == tokens[:, 15 + h]).float().mean().item()
        assert metrics[f"rollout.ctx6.h{h}.token_acc"] == pytest.approx(accuracy)
        codes = len(set(made[:, h - 1].flatten().tolist()))
        assert metrics[f"rollout.ctx6.h{h}.codes"] == codes


# ---------------------------------------------------------------- true pictures


def test_true_pictures_are_those_of_the_kept_frames(files):
    clips = TokenClips(files.tokens, "val")
    windows = np.array([(1, 4), (2, 0), (0, 0), (1, 1)])
    found = dict(evaluate.true_pictures(clips, windows, skip=16))
    assert sorted(found) == [0, 2, 3], "none for the clip whose video is not there"
    for n in found:
        clip, start = windows[n]
        video = list(read_frames(clips.directory / clips.entries[clip].video))
        expected = [video[2 * (start + 16 + i)] for i in range(20)]
        assert np.array_equal(found[n], np.stack(expected))


def test_tokenizer_psnr_is_of_the_decoded_truth(files, model, tokenizer):
    clips = TokenClips(files.tokens, "val")
    metrics = run_free(model, tokenizer, clips, [(0, 3), (2, 3)], Choice())
    pictures = dict(evaluate.true_pictures(clips, np.array([(0, 3)]), skip=16))[0]
    tokens = torch.from_numpy(clips.tokens[0][19:39].astype(np.int64))
    with torch.no_grad():
        made = tokenizer.decode_code(tokens)
    expected = psnr(made, torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255)
    assert metrics["tokenizer.psnr"] == pytest.approx(expected.mean().item(), rel=1e-5)
    assert metrics["truth.h4.psnr_frames"] == pytest.approx(expected[3].item(), rel=1e-5)
    assert "copy.ctx16.h20.psnr_frames" in metrics and "rollout.ctx1.mean20.psnr_frames" in metrics


# ---------------------------------------------------------------- windows


@pytest.mark.parametrize("count", [1, 2, 3, 7, 40])
def test_windows_are_spread_over_clips(count):
    lengths = [100, 20, 36, 500, 90]
    windows = evaluate.spread_windows(lengths, 36, count, seed=0)
    assert windows.shape == (count, 2)
    for clip, start in windows:
        assert 0 <= start <= lengths[clip] - 36
    given = np.bincount(windows[:, 0], minlength=5)
    assert given[1] == 0, "too short"
    shares = given[[0, 2, 3, 4]]
    assert shares.max() - shares.min() <= 1
    long = windows[windows[:, 0] == 3, 1]
    assert (np.diff(long) > 0).all() and (len(long) < 4 or np.ptp(long) > 230), "and along each"
    assert np.array_equal(windows, evaluate.spread_windows(lengths, 36, count, seed=0))


def test_windows_need_a_clip_that_is_long_enough():
    with pytest.raises(DataError, match="36 frames of a window .the longest has 35"):
        evaluate.spread_windows([10, 35], 36, 4, seed=0)


def test_intervals_are_over_clips_not_windows():
    """20 windows of two clips: however many windows, only two independent things were seen."""
    clip = np.array([0] * 19 + [1])
    values = np.where(clip == 0, 10.0, 20.0)[:, None].repeat(20, 1)
    rows = {"rollout.ctx1": {"token_acc": values}, "truth": {}}
    metrics, intervals = evaluate.rollout_metrics(rows, clip, seed=0)
    assert metrics["rollout.ctx1.h8.token_acc"] == pytest.approx(10.5)
    assert intervals["rollout.ctx1.h8.token_acc"] == [10.0, 20.0]


# ---------------------------------------------------------------- the script


@pytest.fixture(scope="module")
def result(files, tmp_path_factory) -> dict:
    """What a run of the script writes."""
    out = tmp_path_factory.mktemp("out") / "deep" / "world.json"
    evaluate.main(files.flags("--windows", 4, "--out", out, "--topk", 8))
    return json.loads(out.read_text())


def test_metrics_are_flat_and_complete(result):
    metrics = result["metrics"]
    assert all(isinstance(value, float) and math.isfinite(value) for value in metrics.values())
    assert {"tf.bits_per_token", "tf.accuracy", "copy.tf.accuracy", "tokenizer.psnr"} <= metrics.keys()
    for row in ("rollout", "copy"):
        for context in (1, 6, 16):
            for when in ("h1", "h4", "h8", "h16", "h20", "mean20"):
                for name in ("psnr_tokens", "psnr_frames", "token_acc", "codes_ratio"):
                    assert f"{row}.ctx{context}.{when}.{name}" in metrics
    assert metrics["copy.ctx1.h8.psnr_tokens"] == metrics["copy.ctx16.h8.psnr_tokens"]
    for key, (low, high) in result["ci95"].items():
        assert low <= metrics[key] + 1e-9 and metrics[key] - 1e-9 <= high


def test_meta_says_where_the_numbers_come_from(result, files):
    meta = result["meta"]
    assert meta["checkpoint"] == "world.pt" and meta["step"] == 12
    assert meta["parameters"] == sum(p.numel() for p in ConvGRUWorldModel(TINY_WORLD).parameters())
    assert meta["split"] == "val" and meta["clips"] == ["counting", "random", "still"]
    assert meta["sampling"] == {"greedy": False, "temperature": PLAY_TEMPERATURE, "top_k": 8}
    assert meta["windows"] == 4 and meta["seed"] == 0
    assert {"data", "command", "commit", "machine"} <= meta.keys()
    text = json.dumps(result)
    for private in (str(files.tokens.parent), str(evaluate.ROOT), str(Path.home()) + "/"):
        assert private not in text


def test_the_same_seed_gives_the_same_numbers(result, files, tmp_path):
    numbers = {}
    for seed in (0, 1):
        out = tmp_path / f"{seed}.json"
        evaluate.main(files.flags("--windows", 4, "--out", out, "--topk", 8, "--seed", seed))
        numbers[seed] = json.loads(out.read_text())["metrics"]
    assert numbers[0] == result["metrics"]
    assert numbers[1] != numbers[0]
    assert numbers[1]["tf.bits_per_token"] == numbers[0]["tf.bits_per_token"], "no chance is involved here"


def test_the_table_shows_the_numbers_that_are_written(files, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evaluate.main(files.flags("--quick", "--windows", 2, "--split", "all", "--greedy"))
    said = capsys.readouterr().out
    (written,) = (tmp_path / "outputs" / "eval").iterdir()
    assert written.name.endswith("_world_quick.json") and str(written.relative_to(tmp_path)) in said
    metrics = json.loads(written.read_text())["metrics"]
    line = next(line for line in said.splitlines() if line.startswith("| model | "))
    assert line.split("|")[2].strip().startswith(f"{metrics['tf.bits_per_token']:.3f}")
    block = said[said.index("| Token accuracy") :]
    row = next(line for line in block.splitlines() if line.startswith("| model, 6 frames of context"))
    cells = [cell.strip() for cell in row.split("|")[2:-1]]
    assert cells[:5] == [f"{metrics[f'rollout.ctx6.h{h}.token_acc']:.3f}" for h in (1, 4, 8, 16, 20)]
    assert cells[5].startswith(f"{metrics['rollout.ctx6.mean20.token_acc']:.3f}")
    assert "copy last frame" in block and "greedy" in said
    for block in said.split("\n\n"):
        widths = {line.count("|") for line in block.splitlines() if line.startswith("|")}
        assert len(widths) <= 1, "every table is a table"


def test_quick_takes_fewer_clips(files, monkeypatch, tmp_path):
    monkeypatch.setattr(evaluate, "QUICK_CLIPS", 2)
    monkeypatch.setattr(evaluate, "QUICK_WINDOWS", 3)
    evaluate.main(files.flags("--quick", "--out", tmp_path / "a.json"))
    meta = json.loads((tmp_path / "a.json").read_text())["meta"]
    assert meta["clips"] == ["counting", "still"] and meta["windows"] == 3 and meta["quick"]


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
        "--windows",
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
        (("--windows", 0), "--windows 0"),
        (("--temperature", 0), "temperature 0"),
        (("--topk", -1), "top_k -1"),
    ],
)
def test_wrong_words_are_refused_in_one_line(files, capsys, more, told):
    assert told in refused(files, capsys, *more)


def test_tokens_of_another_tokenizer_are_refused(files, capsys, tmp_path):
    other = tmp_path / "other.pt"
    checkpoint.save(other, checkpoint.tokenizer_content(tiny_tokenizer(seed=5)))
    assert "--vqvae_ckpt" in refused(files, capsys, "--vqvae_ckpt", other), "the world minds first"
    content = checkpoint.load(files.world)
    content["tokenizer"] = checkpoint.load_tokenizer(other).fingerprint
    checkpoint.save(tmp_path / "world.pt", content)
    message = refused(files, capsys, "--vqvae_ckpt", other, "--checkpoint", tmp_path / "world.pt")
    assert "manifest.json" in message and content["tokenizer"] in message


def test_tokens_at_another_frame_rate_are_refused(files, capsys, tmp_path):
    content = checkpoint.load(files.world)
    content["data"]["fps"] = 8.0
    checkpoint.save(tmp_path / "slow.pt", content)
    message = refused(files, capsys, "--checkpoint", tmp_path / "slow.pt")
    assert "fps is 16" in message and "trained at 8" in message
