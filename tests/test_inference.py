"""inference.py: the kinds of start, the files written, pipes, and the refusals."""

import io
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import tiny_vqvae, write_manifest
from PIL import Image
from tiny_clip import entry, make_clip

import inference
from dataset.token_files import read_token_file, write_token_file
from rollout import context
from rollout.action_script import parse
from rollout.rollout import Rollout
from runtime import checkpoint
from runtime.video import read_frames, save_image, video_fps
from vq_vae.tokenizer import load_tokenizer, tokenizer_content

ROOT = Path(__file__).resolve().parent.parent
# Buffered stdout, which is Python's default.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": ""}


@pytest.fixture
def run(tiny, tmp_path, capsys):
    """Runs inference.py with the tiny models; gives (exit status, stdout, stderr)."""

    def run(*flags) -> tuple[int, str, str]:
        out = ["--out", str(tmp_path / "out.mp4")] if "--out" not in flags else []
        status = inference.main([*tiny.flags, *out, *map(str, flags)])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def run_pipe(tiny, monkeypatch, capsys):
    """Runs inference.py between two pipes; gives (exit status, the bytes on stdout, stderr)."""

    def run_pipe(stdin: bytes, *flags) -> tuple[int, bytes, str]:
        words = ["--script", "-", "--out", "-", "--scale", 1, *flags]
        if "--context_npz" not in flags:
            words += ["--context_npz", tiny.tokens]
        stdout = io.TextIOWrapper(io.BytesIO())
        with monkeypatch.context() as patch:
            patch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin)))
            patch.setattr("sys.stdout", stdout)
            status = inference.main([*tiny.flags, *map(str, words)])
        return status, stdout.buffer.getvalue(), capsys.readouterr().err

    return run_pipe


def load(*flags) -> tuple[context.World, Rollout, inference.InferenceConfig]:
    """The world, the rollout and the config of some flags."""
    config = inference.parse_config([*map(str, flags)])
    f = config.rollout
    world = context.load_world(f.checkpoint, f.vqvae_ckpt, f.device, f.precision)
    return world, Rollout(world.model, f.sampling, f.seed, world.dtype), config


def shape_of(video: Path) -> tuple[int, ...]:
    """(frames, height, width, 3)"""
    return np.stack(list(read_frames(video))).shape


def test_recorded_actions_are_shown_beside_the_truth(run, tiny, tmp_path):
    status, out, _ = run("--context_npz", tiny.tokens, "--context_frames", 10, "--scale", 4)
    assert status == 0
    assert shape_of(tmp_path / "out.mp4") == (30, 16 * 4 + 16, 3 * 32 * 4, 3)  # 16: the strip with the names
    assert video_fps(tmp_path / "out.mp4") == 16
    assert "PSNR" in out and "token accuracy" in out and "frames/s" in out
    assert str(tmp_path / "out.mp4") in out and str(tmp_path / "out_sheet.png") in out
    assert cv2.imread(str(tmp_path / "out_sheet.png")) is not None


def test_a_perfect_rollout_scores_perfectly(run, tiny, tmp_path):
    """The truth is made by the model itself, greedily: an offset of one frame anywhere would show."""
    recorded = read_token_file(tiny.tokens)
    _, rollout, _ = load(*tiny.flags, "--greedy")
    first, actions = torch.from_numpy(recorded["tokens"][:6].astype(np.int64)), recorded["actions"]
    rollout.prime(first[None], torch.from_numpy(actions[None, :5]))
    generated = rollout.run(torch.from_numpy(actions[None, 5:]))[0]
    write_token_file(tmp_path / "own.npz", torch.cat([first, generated]).numpy(), actions, recorded["pose"])
    _, out, _ = run("--context_npz", tmp_path / "own.npz", "--warmup", 6, "--greedy")
    assert "token accuracy 1.000" in out and "PSNR 58.9" in out


def test_script_and_frames(run, tiny, tmp_path):
    status, out, _ = run("--context_npz", tiny.tokens, "--script", "w*3,idle", "--frames", 6, "--scale", 2)
    assert status == 0 and "PSNR" not in out
    assert shape_of(tmp_path / "out.mp4") == (6, 32, 64, 3)


def test_webm_and_fps(run, tiny, tmp_path):
    out = tmp_path / "deep" / "out.webm"
    assert run("--context_npz", tiny.tokens, "--script", "w*5", "--fps", 8, "--out", out)[0] == 0
    assert len(list(read_frames(out))) == 5 and video_fps(out) == 8


def test_from_a_picture(run, tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (200, 300, 3), np.uint8)
    save_image(tmp_path / "start.png", picture)
    status, out, _ = run("--start", tmp_path / "start.png", "--script", "w*4", "--scale", 1)
    assert status == 0 and "(1 of context)" in out
    assert shape_of(tmp_path / "out.mp4") == (4, 16, 32, 3)


def test_a_picture_without_a_script_takes_a_walk(run, tmp_path):
    save_image(tmp_path / "start.jpg", np.zeros((16, 32, 3), np.uint8))
    status, out, _ = run("--start", tmp_path / "start.jpg", "--frames", 5)
    assert status == 0 and "a scripted walk" in out


def test_from_a_clip_by_its_own_actions(run, tmp_path):
    clip = make_clip(tmp_path, [entry(), *[entry(0.1 * k, ws=1) for k in range(1, 12)]], 12)
    status, out, _ = run("--start", clip, "--context_frames", 4, "--frames", 5, "--scale", 1)
    assert status == 0 and "PSNR" in out and "(4 of context)" in out
    assert shape_of(tmp_path / "out.mp4") == (5, 16 + 16, 96, 3)


def test_a_clip_without_actions_gives_its_first_frame(run, tmp_path):
    clip = make_clip(tmp_path, None, 3)
    status, out, _ = run("--start", clip, "--script", "w*2")
    assert status == 0 and "only the first frame is used" in out and "(1 of context)" in out


def test_whole_recording_as_context(run, tiny):
    status, out, _ = run("--context_npz", tiny.tokens, "--context_frames", 0, "--script", "w*2")
    assert status == 0 and "(40 of context)" in out


def rollout_tokens(tiny, *flags) -> torch.Tensor:
    world, rollout, config = load(*tiny.flags, "--context_npz", tiny.tokens, *flags)
    (path,) = config.rollout.starts
    context.prime(rollout, [context.load_recording(path, world).first(config.rollout.context_frames)])
    return rollout.run(torch.from_numpy(parse("w*8,yaw+0.5*4"))[None])


def test_same_seed_same_rollout(tiny):
    first = rollout_tokens(tiny, "--seed", "3")
    torch.manual_seed(99)  # the rollout has its own generator
    assert torch.equal(first, rollout_tokens(tiny, "--seed", "3"))
    assert not torch.equal(first, rollout_tokens(tiny, "--seed", "4"))
    greedy = rollout_tokens(tiny, "--seed", "3", "--greedy")
    assert torch.equal(greedy, rollout_tokens(tiny, "--seed", "4", "--greedy"))
    assert torch.equal(greedy, rollout_tokens(tiny, "--seed", "5", "--topk", "1", "--code_balance", "0"))
    assert not torch.equal(first, rollout_tokens(tiny, "--seed", "3", "--temperature", "0.1"))


@pytest.fixture
def other(tiny, tmp_path) -> Path:
    """A second token file, of 30 frames."""
    content = read_token_file(tiny.tokens)
    path = tmp_path / "other.npz"
    write_token_file(path, content["tokens"][10:], -content["actions"][10:], content["pose"][10:])
    return path


def test_several_starts_give_the_frames_of_each_alone(run, tiny, other, tmp_path):
    def frames(*starts: Path) -> np.ndarray:
        flags = "--context_frames", 4, "--frames", 6, "--scale", 1, "--greedy", "--columns", "generated"
        status, out, _ = run("--context_npz", *starts, *flags, "--out", tmp_path / "a.gif")
        assert status == 0
        with Image.open(tmp_path / "a.gif") as gif:
            found = []
            for n in range(gif.n_frames):
                gif.seek(n)
                found.append(np.asarray(gif.convert("RGB")).astype(int))
        printed.append(out)
        return np.stack(found)

    printed = []
    one, _, both = frames(tiny.tokens), frames(other), frames(tiny.tokens, other)
    assert one.shape == (6, 16, 32, 3) and both.shape == (6, 16 + 16, 2 * 32, 3)  # 16: the names

    def scores(out: str) -> dict[str, str]:
        return dict(re.findall(r"^(\w+), against.*PSNR ([\d.]+) dB", out, re.M))

    assert scores(printed[2])["clip"] == scores(printed[0])["clip"]
    assert scores(printed[2])["other"] == scores(printed[1])["other"]
    assert scores(printed[0])["clip"] != scores(printed[1])["other"]
    mean = (float(scores(printed[0])["clip"]) + float(scores(printed[1])["other"])) / 2
    assert float(scores(printed[2])["mean"]) == pytest.approx(mean, abs=0.02)


def test_the_shortest_context_is_used_for_all(run, tiny, other, tmp_path):
    save_image(tmp_path / "photo.png", np.zeros((16, 32, 3), np.uint8))
    status, out, _ = run("--start", tiny.tokens, tmp_path / "photo.png", "--script", "w*2")
    assert status == 0 and "context: the last 1 frames of each" in out and "(1 of context)" in out
    status, out, _ = run("--start", tiny.tokens, other, "--context_frames", 20, "--frames", 50)
    assert status == 0 and "only 10 actions" in out and "generated 10 frames" in out
    status, out, _ = run("--start", tmp_path / "photo.png", tiny.tokens, "--frames", 2)
    assert "a scripted walk" in out


def test_video_and_sheet_name_the_starts(run, tiny, tmp_path):
    shown = {}
    for name in ("here", "there"):
        write_token_file(tmp_path / f"{name}.npz", **read_token_file(tiny.tokens))
        starts = "--context_npz", tiny.tokens, tmp_path / f"{name}.npz"
        assert run(*starts, "--frames", 2, "--columns", "generated")[0] == 0
        shown[name] = next(read_frames(tmp_path / "out.mp4")), cv2.imread(str(tmp_path / "out_sheet.png"))
    for here, there in zip(shown["here"], shown["there"], strict=True):
        assert here.shape == there.shape and (here != there).any()  # the same except for the name


def test_columns(run, tiny, tmp_path):
    flags = "--context_npz", tiny.tokens, "--frames", 3, "--scale", 1, "--out"
    shown = {}
    for column in inference.COLUMNS:
        assert run(*flags, tmp_path / f"{column}.webm", "--columns", column)[0] == 0
        shown[column] = np.stack(list(read_frames(tmp_path / f"{column}.webm"))).astype(int)
        assert shown[column].shape == (3, 16, 32, 3)
    expected = (inference.GAIN * np.abs(shown["truth"] - shown["generated"])).clip(0, 255)
    assert np.abs(shown["difference"] - expected).mean() < 12 < np.abs(shown["generated"] - expected).mean()
    status, out, _ = run(*flags, tmp_path / "a.mp4", "--script", "w*2", "--columns", "truth")
    assert status == 0 and "showing generated only" in out


def test_saved_actions_give_the_same_actions(run, tiny, tmp_path):
    played = tmp_path / "deep" / "played.txt"
    assert run("--context_npz", tiny.tokens, "--frames", 9, "--save_actions", played)[0] == 0
    recorded = read_token_file(tiny.tokens)["actions"][15:24]
    assert inference.read_script(f"@{played}").tobytes() == recorded.tobytes()
    status, out, _ = run("--context_npz", tiny.tokens, "--script", f"@{played}")
    assert status == 0 and "generated 9 frames" in out


def test_a_program_in_the_loop_gets_a_frame_for_each_action(tiny, tmp_path):
    """It writes the next action only after it has read the frame of the last one; then it closes its end."""
    played = tmp_path / "played.txt"
    words = [*tiny.flags, "--script", "-", "--out", "-", "--scale", "1", "--greedy"]
    words += ["--context_npz", tiny.tokens, "--save_actions", played]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "inference.py"), *map(str, words)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT,
    )  # fmt: skip
    watchdog = threading.Timer(120, process.kill)  # a missing frame would block for ever
    watchdog.daemon = True
    watchdog.start()
    with process:
        frames = []
        for line, count in ((b"w\n", 1), (b"# nothing\n", 0), (b"yaw+1*2\n", 2), (b"[0,0,0,1,1]\n", 1)):
            process.stdin.write(line)
            process.stdin.flush()
            frames += [process.stdout.read(16 * 32 * 3) for _ in range(count)]
        process.stdout.close()
        process.stdin.write(b"d*50\n")
        process.stdin.close()
        err = process.stderr.read().decode()
        assert process.wait() == 0 and "Traceback" not in err and "Error" not in err
    watchdog.cancel()
    assert "32x16 RGB24 at 16 frames/s" in err and "stdout was closed" in err
    assert played.read_text() == "w*1\nyaw+1.00*2\nw+jump*1\nd*1\n"  # the frame of d had no reader
    world, rollout, _ = load(*tiny.flags, "--greedy")
    context.prime(rollout, [context.load_recording(tiny.tokens, world).first(16)])
    for frame, action in zip(frames, parse("w,yaw+1*2,w+jump"), strict=True):
        rollout.step(torch.from_numpy(action)[None])
        assert frame == rollout.pictures()[0].numpy().tobytes()


def test_several_starts_lie_side_by_side_in_a_pipe_without_names(tiny, other, run_pipe):
    def frames(*starts: Path) -> np.ndarray:
        status, out, err = run_pipe(b"w*3,yaw+1*2\n", "--greedy", "--context_npz", *starts)
        assert status == 0 and f"{32 * len(starts)}x16 RGB24" in err
        return np.frombuffer(out, np.uint8).reshape(5, 16, 32 * len(starts), 3)

    one, two = frames(tiny.tokens), frames(other)
    assert (one != two).any()
    np.testing.assert_array_equal(frames(tiny.tokens, other), np.concatenate([one, two], 2))


def test_recorded_actions_into_a_pipe(tiny, run, monkeypatch, capsys):
    """Only the generated frames go there; the scores are printed all the same."""
    stdout = io.TextIOWrapper(io.BytesIO())
    words = [*tiny.flags, "--context_npz", tiny.tokens, "--frames", 7, "--scale", 2, "--out", "-"]
    with monkeypatch.context() as patch:
        patch.setattr("sys.stdout", stdout)
        assert inference.main([*map(str, words), "--columns", "truth"]) == 0
    err = capsys.readouterr().err
    assert len(stdout.buffer.getvalue()) == 7 * 32 * 64 * 3
    assert "showing generated only" in err and "token accuracy" in err and "Traceback" not in err
    scores = re.search("PSNR.*", err).group()
    assert scores in run("--context_npz", tiny.tokens, "--frames", 7)[1]


def test_frames_are_not_written_to_a_terminal(tiny, monkeypatch, capsys):
    controller, terminal = os.openpty()
    with os.fdopen(terminal, "w") as stdout, monkeypatch.context() as patch:
        patch.setattr("sys.stdout", stdout)
        status = inference.main([*tiny.flags, "--out", "-"])
    os.close(controller)
    refused((status, *capsys.readouterr()), "--out -", "terminal")


@pytest.mark.parametrize(
    "line, position", [(b"w,fly", 3), (b"  w*x", 5), (b"\xff\x00", 1), (b"[0,0,2,0,0]", 6)]
)
def test_a_bad_line_is_named(run_pipe, line, position):
    status, out, err = run_pipe(b"w\n\n" + line + b"\nw\n")
    assert len(out) == 16 * 32 * 3
    refused((status, "", err), "stdin, line 3: action script", f"character {position}:")


def test_lines_from_stdin_into_a_video(run, tiny, tmp_path, monkeypatch):
    def stdin(text: str) -> None:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))

    stdin("w*3\nidle\n")
    status, out, _ = run("--context_npz", tiny.tokens, "--script", "-", "--scale", 1)
    assert status == 0 and shape_of(tmp_path / "out.mp4") == (4, 16, 32, 3)
    stdin("w*30\n")
    assert run("--context_npz", tiny.tokens, "--script", "-", "--frames", 5)[0] == 0
    assert len(list(read_frames(tmp_path / "out.mp4"))) == 5
    stdin("")
    status, out, _ = run("--context_npz", tiny.tokens, "--script", "-")
    assert status == 0 and "nothing to write" in out


def refused(result: tuple[int, str, str], *parts: str) -> None:
    """Checks for exit status 2 and one error line on stderr that contains `parts`."""
    status, _, err = result
    assert status == 2
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in err
    for part in parts:
        assert part in lines[0]


def test_missing_files_are_named(run, tiny, tmp_path):
    gone = tmp_path / "gone"
    refused(run("--checkpoint", gone), str(gone))
    refused(run("--vqvae_ckpt", gone), str(gone))
    refused(run("--context_npz", f"{gone}.npz"), f"{gone}.npz")
    refused(run("--start", f"{gone}.png"), f"{gone}.png", "no such picture")
    refused(run("--start", f"{gone}.mp4"), f"{gone}.mp4", "no such video")


def test_broken_files_are_named(run, tiny, tmp_path):
    for name in ("a.npz", "a.png", "a.mp4"):
        (tmp_path / name).write_bytes(b"not what it says")
        refused(run("--start", tmp_path / name), str(tmp_path / name))
    cut = tmp_path / "cut.npz"
    cut.write_bytes(tiny.tokens.read_bytes()[:200])
    refused(run("--context_npz", cut), str(cut), "preprocess.py")
    refused(run("--context_npz", tiny.tokens, "--checkpoint", cut), str(cut))
    clip = make_clip(tmp_path, [entry(), {"ws": 7}], 3)
    refused(run("--start", clip), "c.json", "entry 1")
    (tmp_path / "metadata" / "c.json").write_text("{")
    refused(run("--start", clip), "c.json", "not a clip's metadata")


def test_files_that_do_not_belong_together_are_refused(run, tiny, tmp_path):
    other = tmp_path / "other.pt"
    checkpoint.save(other, tokenizer_content(tiny_vqvae(seed=5)))
    refused(run("--vqvae_ckpt", other), "was made by tokenizer", str(tiny.world))

    copy = tmp_path / "copy.npz"
    copy.write_bytes(tiny.tokens.read_bytes())
    write_manifest(copy, "0123456789abcdef")
    refused(run("--context_npz", copy), str(copy), "0123456789abcdef", "encode the clips again")
    write_manifest(copy, load_tokenizer(tiny.tokenizer).fingerprint, fps=8.0)
    refused(run("--context_npz", copy), "8 frames/s", "--fps_target 16")
    (tmp_path / "manifest.json").unlink()
    assert run("--context_npz", copy, "--script", "w")[0] == 0  # without a manifest nothing contradicts it

    content = read_token_file(copy)
    write_token_file(copy, content["tokens"] + 1000, content["actions"], content["pose"])
    refused(run("--context_npz", copy), "expected 0 to 63")
    write_token_file(copy, content["tokens"][:, :, :3], content["actions"], content["pose"])
    refused(run("--context_npz", copy), "grid [4, 3]")


def test_bad_flags_are_refused_before_anything_is_loaded(run, tmp_path):
    refused(run("--script", "w*3,fly", "--checkpoint", "gone"), "character 5", "fly")
    (tmp_path / "walk.txt").write_text("w\n(w*3,\n")
    refused(
        run("--script", f"@{tmp_path}/walk.txt", "--checkpoint", "gone"), "walk.txt, line 2", "character 6"
    )
    refused(run("--script", "@gone.txt"), "gone.txt")
    (tmp_path / "walk.txt").write_text("# nothing yet\n")
    refused(run("--script", f"@{tmp_path}/walk.txt", "--checkpoint", "gone"), "walk.txt", "no action")
    (tmp_path / "walk.txt").write_bytes(b"w\xff")
    refused(
        run("--script", f"@{tmp_path}/walk.txt", "--checkpoint", "gone"), "walk.txt, line 1", "character 2"
    )
    refused(run("--out", tmp_path / "out.avi", "--checkpoint", "gone"), ".mp4, .webm or .gif")
    for flags in (["--temperature", "0"], ["--topk", "-1"], ["--frames", "0"], ["--fps", "nan"]):
        with pytest.raises(SystemExit) as caught:
            inference.build_parser().parse_args(flags)
        assert caught.value.code == 2


def test_no_input_is_overwritten(run, tiny, tmp_path):
    photo, script = tmp_path / "photo.png", tmp_path / "walk.txt"
    save_image(photo, np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8))
    script.write_text("w*2\n")
    clip = make_clip(tmp_path, [entry(), entry()], 2)
    metadata = tmp_path / "metadata" / "c.json"
    tokens = tmp_path / "tokens" / "copy.npz"
    tokens.parent.mkdir()
    tokens.write_bytes(tiny.tokens.read_bytes())
    write_manifest(tokens, load_tokenizer(tiny.tokenizer).fingerprint)
    (tmp_path / "link.mp4").symlink_to(clip)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for flags, named in (
        (["--start", clip, "--out", clip], clip),
        (["--start", clip, "--out", tmp_path / "link.mp4"], tmp_path / "link.mp4"),
        (["--start", clip, "--save_actions", metadata], metadata),
        (["--start", photo, "--save_actions", photo, "--script", "w"], photo),
        (["--start", photo, "--script", f"@{script}", "--save_actions", script], script),
        (["--context_npz", tokens, "--save_actions", tokens], tokens),
        (["--context_npz", tokens, "--save_actions", tokens.with_name("manifest.json")], "manifest.json"),
        (["--context_npz", tokens, "--save_actions", tiny.world], tiny.world),
        (["--context_npz", tokens, "--save_actions", tmp_path / "out_sheet.png"], "out_sheet.png"),
        (["--start", photo, "--script", "w", "--out", photo / "out.mp4"], "out.mp4"),
    ):
        refused(run(*flags), str(named))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert run("--start", photo, "--script", "w*2", "--out", tmp_path / "photo.mp4")[0] == 0
    assert photo.read_bytes() == before[photo] and (tmp_path / "photo_sheet.png").is_file()


def test_a_failing_run_keeps_the_video_of_the_last_one(run, tiny, tmp_path, monkeypatch):
    out = tmp_path / "out.mp4"
    assert run("--context_npz", tiny.tokens, "--script", "w*2", "--save_actions", tmp_path / "w.txt")[0] == 0
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("runtime.outputs.os.fsync", fail)
    refused(run("--context_npz", tiny.tokens, "--script", "w*3"), str(out), "free some space")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before and out in before


@pytest.mark.parametrize("script", ["inference.py", "live_inference.py"])
def test_help_needs_no_data_display_or_gpu(script, tmp_path):
    env = {"PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / script), "--help"], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stderr == ""
    for flag in (
        "--checkpoint --vqvae_ckpt --context_npz --greedy --temperature --topk --fps --scale --warmup".split()
    ):
        assert flag in done.stdout
    assert not list(tmp_path.iterdir())
