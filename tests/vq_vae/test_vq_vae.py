"""The tokenizer: shapes, the quantizer, and the scripts of vq_vae/ at a tiny size."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_vqvae

from dataset.token_files import split_of
from metrics import psnr
from runtime import checkpoint
from runtime.video import read_image, write_video
from vq_vae import preprocess_vqvae, train_vqvae, vq_vae_inference
from vq_vae.tokenizer import load_tokenizer, tokenizer_content
from vq_vae.vq_vae import VQVAE, VectorQuantizerEMA, VQVAEConfig

SCRIPTS = Path(train_vqvae.__file__).parent


# ---------------------------------------------------------------- shapes


@torch.no_grad()
@pytest.mark.parametrize("height, width", [(72, 128), (64, 64), (16, 36)])
def test_a_quarter_of_each_side(height, width):
    model = VQVAE(VQVAEConfig(height, width, 32, 8, 8, 1)).eval()
    pictures = torch.rand(2, 3, height, width)
    tokens = model.encode(pictures)
    assert tokens.shape == (2, height // 4, width // 4) == (2, *model.config.latent_size)
    assert tokens.dtype == torch.int64 and tokens.min() >= 0 and tokens.max() < 32
    made, same, _ = model(pictures)
    assert made.shape == pictures.shape and made.dtype == torch.float32
    assert torch.equal(tokens, same), "encode and forward agree"
    torch.testing.assert_close(model.decode_code(tokens), made)
    assert made.min() >= 0 and made.max() <= 1


@torch.no_grad()
def test_decode_code_of_one_grid_is_one_picture():
    model = tiny_vqvae().eval()
    tokens = torch.randint(0, 64, (3, 4, 8))
    batch = model.decode_code(tokens)
    assert batch.shape == (3, 3, 16, 32)
    assert model.decode_code(tokens[1]).shape == (3, 16, 32)
    torch.testing.assert_close(model.decode_code(tokens[1]), batch[1])
    torch.testing.assert_close(model.decode_code(tokens.to(torch.int32)), batch)
    with pytest.raises(ValueError, match=r"expected \[H, W\] or \[B, H, W\]"):
        model.decode_code(tokens[None])


@pytest.mark.parametrize("height, width", [(70, 128), (72, 127)])
def test_sides_that_are_not_divisible_by_4_are_refused(height, width):
    with pytest.raises(ValueError, match=f"{width}x{height}.*divisible by 4"):
        VQVAEConfig(height, width)


def test_pictures_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"\[1, 3, 32, 16\].*\[3, 16, 32\]"):
        tiny_vqvae().encode(torch.rand(1, 3, 32, 16))


# ---------------------------------------------------------------- the quantizer


def quantizer(codes: int = 8, dim: int = 3, decay: float = 0.9) -> VectorQuantizerEMA:
    """A quantizer whose codebook is not initialised from the first batch."""
    torch.manual_seed(0)
    made = VectorQuantizerEMA(codes, dim, decay)
    made.initialised.fill_(True)
    return made


def brute_force(flat: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    return (flat[:, None].double() - codebook[None].double()).square().sum(-1).argmin(1)


@pytest.mark.parametrize("autocast", [False, True])
def test_nearest_is_the_nearest_by_brute_force(autocast):
    """The codes are closer together than bfloat16 can resolve, so only float32 finds the nearest."""
    torch.manual_seed(0)
    vq = VectorQuantizerEMA(256, 16, 0.99).eval()
    vq.codebook.copy_(5 + 0.05 * torch.randn(256, 16))
    z = 5 + 0.05 * torch.randn(4, 16, 6, 6)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        quantized, tokens, commitment = vq(z)
        flat = z.permute(0, 2, 3, 1).reshape(-1, 16)
        assert torch.equal(vq.nearest(flat), tokens.flatten()), "also when called alone, as by encode"
    right = brute_force(flat, vq.codebook)
    distance = (flat - vq.codebook[tokens.flatten()]).square().sum(1)
    torch.testing.assert_close(distance, (flat - vq.codebook[right]).square().sum(1), rtol=1e-3, atol=1e-4)
    assert (tokens.flatten() == right).float().mean() > 0.97, "but for ties within float32's rounding"
    assert quantized.dtype == commitment.dtype == torch.float32
    in_bfloat16 = brute_force(flat.bfloat16(), vq.codebook.bfloat16())
    assert (in_bfloat16 == right).float().mean() < 0.9, "bfloat16 would fail here"


def test_ema_update_by_hand():
    vq = quantizer(codes=2, dim=1, decay=0.9)
    vq.codebook.copy_(torch.tensor([[0.0], [10.0]]))
    vq.ema_count.fill_(2.0)
    vq.ema_sum.copy_(vq.codebook * 2)
    vq.train()(torch.tensor([1.0, 2.0, 3.0, 8.0]).view(1, 1, 2, 2))  # three of code 0, one of code 1
    count = torch.tensor([0.9 * 2 + 0.1 * 3, 0.9 * 2 + 0.1 * 1])
    total = torch.tensor([0.9 * 0 + 0.1 * 6, 0.9 * 20 + 0.1 * 8])
    torch.testing.assert_close(vq.ema_count, count)
    torch.testing.assert_close(vq.ema_sum[:, 0], total)
    torch.testing.assert_close(vq.codebook[:, 0], total / count)


def test_dead_codes_are_replaced_by_vectors_of_the_batch():
    vq = quantizer(codes=4, dim=2)
    vq.codebook.copy_(torch.tensor([[0.0, 0.0], [1.0, 1.0], [500.0, 500.0], [-500.0, 500.0]]))
    vq.ema_sum.copy_(vq.codebook)
    vq.ema_count.copy_(torch.tensor([1.0, 1.0, 1e-3, 1e-3]))
    z = torch.rand(1, 2, 4, 4)
    vq.train()(z)
    rows = z.permute(0, 2, 3, 1).reshape(-1, 2)
    for code in (2, 3):
        assert (rows == vq.codebook[code]).all(1).any(), "a vector of this batch"
    assert not torch.equal(vq.codebook[2], vq.codebook[3])
    torch.testing.assert_close(vq.ema_sum, vq.codebook * vq.ema_count[:, None]), "the next EMA step keeps it"
    assert vq.codebook[:2].abs().max() < 2, "codes in use follow the average"
    tokens = vq.eval()(z)[1]
    assert {2, 3} <= set(tokens.flatten().tolist()), "and they are used at once"


def test_the_first_batch_initialises_the_codebook():
    torch.manual_seed(0)
    vq = VectorQuantizerEMA(8, 2, 0.99).train()
    z = 100 + torch.rand(2, 2, 4, 4)
    vq(z)
    assert vq.initialised
    assert vq.codebook.min() > 99, "no code keeps its random start"


def test_straight_through_gradient_is_the_identity():
    vq = quantizer().eval()
    z = torch.randn(2, 3, 4, 4, requires_grad=True)
    weight = torch.randn(2, 3, 4, 4)
    quantized, tokens, _ = vq(z)
    torch.testing.assert_close(quantized, vq.lookup(tokens)), "forward: the code itself"
    (quantized * weight).sum().backward()
    torch.testing.assert_close(z.grad, weight)


def test_commitment_pulls_the_encoder_to_its_codes():
    vq = quantizer().eval()
    z = torch.randn(2, 3, 4, 4, requires_grad=True)
    _, tokens, commitment = vq(z)
    torch.testing.assert_close(commitment, F.mse_loss(z, vq.lookup(tokens)))
    commitment.backward()
    torch.testing.assert_close(z.grad, 2 * (z - vq.lookup(tokens)).detach() / z.numel())


def test_eval_mode_never_updates_the_codebook():
    model = tiny_vqvae().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for _ in range(3):
        tokens = model(torch.rand(4, 3, 16, 32))[1]
        model.decode_code(tokens)
    model.train().encode(torch.rand(4, 3, 16, 32))  # encode does not in any mode
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_few_steps_of_training_reconstruct_better():
    torch.manual_seed(0)
    model = VQVAE(VQVAEConfig(16, 16, 32, 16, 32, 1)).train()
    pictures = torch.rand(16, 3, 1, 1).expand(16, 3, 16, 16)  # one colour each
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    values = []
    for _ in range(120):
        made, _, commitment = model(pictures)
        loss = F.mse_loss(made, pictures) + 0.05 * commitment
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(psnr(made.detach(), pictures).mean().item())
    assert values[-1] > values[0] + 2


# ---------------------------------------------------------------- the scripts, run for real

TINY = [
    *("HEIGHT=32", "WIDTH=48", "CODEBOOK_SIZE=8", "EMBEDDING_DIM=4", "HIDDEN_DIM=8", "RESIDUAL_BLOCKS=1"),
    *("BATCH_SIZE=2", "PERCEPTUAL=effnet-lite0", "PERCEPTUAL_BATCH=1", "VAL_PICTURES=2", "LOG_STEPS=2"),
    *(
        "VAL_STEPS=4",
        "WARMUP_STEPS=2",
        "FINAL_LR_FACTOR=1.0",
        "DEVICE=cpu",
        "PRECISION=fp32",
        "WANDB=disabled",
    ),
]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """12 + 3 pictures of 48x32 as preprocess_vqvae.py writes them."""
    path = tmp_path_factory.mktemp("pictures") / "pictures.npz"
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (15, 8, 12, 3), dtype=np.uint8).repeat(4, 1).repeat(4, 2)
    np.savez(path, train=blocks[:12], val=blocks[12:])
    return path


def train(monkeypatch, pictures: Path, out: Path, *words: str) -> int:
    """`python vq_vae/train_vqvae.py` with small settings, in this process; returns the exit status."""
    given = {word.partition("=")[0] for word in words}
    tiny = [word for word in TINY if word.partition("=")[0] not in given]
    arguments = [f"PICTURES={pictures}", f"OUT_DIR={out}", *tiny, *words]
    monkeypatch.setattr(sys, "argv", ["train_vqvae.py", *arguments])
    return train_vqvae.main()


def test_train_vqvae_as_a_script(pictures, tmp_path):
    command = [sys.executable, str(SCRIPTS / "train_vqvae.py"), f"PICTURES={pictures}", *TINY]
    done = subprocess.run(
        [*command, "STEPS=4", "OUT_DIR=run"], cwd=tmp_path, capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    assert {"last.pt", "best.pt", "log.jsonl", "reconstruction_000004.png"} <= {p.name for p in run.iterdir()}
    tokenizer = load_tokenizer(run / "best.pt")
    assert tokenizer.config.latent_size == (8, 12)
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    keys = set().union(*rows)
    assert {
        "loss",
        "mse",
        "commitment",
        "effnet-lite0",
        "used_codes",
        "perplexity",
        "lr",
        "grad_norm",
    } <= keys
    assert {"val_mse", "val_psnr", "val_effnet-lite0", "val_used_codes", "val_perplexity"} <= keys
    assert [row["step"] for row in rows] == sorted(row["step"] for row in rows)
    assert read_image(run / "reconstruction_000004.png").shape == (2 * 32, 48, 3), "originals above theirs"


def test_a_resumed_run_ends_with_the_weights_of_an_unbroken_one(
    pictures, tmp_path, monkeypatch, capsys, one_thread
):
    words = ("PERCEPTUAL_START=0.0", "PERCEPTUAL_RAMP=0.0")
    train(monkeypatch, pictures, tmp_path / "a", "STEPS=5", *words)
    train(monkeypatch, pictures, tmp_path / "a", "STEPS=8", *words)
    assert "at step 5" in capsys.readouterr().out
    train(monkeypatch, pictures, tmp_path / "b", "STEPS=8", *words)
    a, b = (checkpoint.load(tmp_path / run / "last.pt") for run in "ab")
    assert a["step"] == b["step"] == 8
    for name in a["model"]:
        assert torch.equal(a["model"][name], b["model"][name]), name


def test_resuming_another_model_is_refused(pictures, tmp_path, monkeypatch, capsys):
    train(monkeypatch, pictures, tmp_path, "STEPS=1")
    assert train(monkeypatch, pictures, tmp_path, "STEPS=2", "HIDDEN_DIM=4") == 2
    assert re.search("last.pt: was trained with .*RESUME=False", capsys.readouterr().err)


@pytest.mark.parametrize(
    "word, message", [("STEP=5", "STEPS"), ("LR=fast", "LR is of type float"), ("HEIGHT", "NAME=value")]
)
def test_train_vqvae_refuses_wrong_words(monkeypatch, capsys, word, message):
    monkeypatch.setattr(sys, "argv", ["train_vqvae.py", word])
    assert train_vqvae.main() == 2 and message in capsys.readouterr().err


def test_train_vqvae_refuses_pictures_of_another_size(pictures, tmp_path, monkeypatch, capsys):
    assert train(monkeypatch, pictures, tmp_path, "WIDTH=52") == 2
    assert re.search(
        r"train is uint8 \[12, 32, 48, 3\], expected uint8 \[N > 0, 32, 52, 3\]", capsys.readouterr().err
    )
    (tmp_path / "broken.npz").write_bytes(pictures.read_bytes()[:-50])
    assert train(monkeypatch, tmp_path / "broken.npz", tmp_path) == 2
    assert re.search(r"broken\.npz: .*preprocess_vqvae\.py", capsys.readouterr().err)


def colours(count: int, first: int) -> list[np.ndarray]:
    """Frames of one colour each, 48x32, red rising by 8 a frame from `first`."""
    return [np.full((32, 48, 3), (first + 8 * i, 60, 120), np.uint8) for i in range(count)]


def test_preprocess_vqvae_samples_frames_of_whole_clips(tmp_path, capsys):
    clips = tmp_path / "clips" / "video"
    write_video(clips / "one.mp4", colours(12, 0), 16)
    write_video(clips / "two.mp4", colours(11, 100), 16)
    (clips / "broken.mp4").write_bytes((clips / "one.mp4").read_bytes()[:200])
    out = tmp_path / "out" / "pictures.npz"
    fraction = next(f / 100 for f in range(100) if split_of("one", f / 100) != split_of("two", f / 100))
    words = (tmp_path / "clips", out, "--height", 16, "--width", 24, "--val_fraction", fraction)
    assert preprocess_vqvae.main([str(word) for word in words]) == 0
    printed = capsys.readouterr().out
    assert "broken.mp4" in printed and "1 skipped" in printed
    with np.load(out) as arrays:
        found = {split_of(name, fraction): first for name, first in (("one", 0), ("two", 100))}
        for split, first in found.items():
            pictures = arrays[split]
            assert pictures.shape == (3, 16, 24, 3) and pictures.dtype == np.uint8
            red = pictures[..., 0].mean((1, 2))
            assert np.abs(red - [first, first + 40, first + 80]).max() < 6, "every fifth frame, red first"
    assert [p.name for p in out.parent.iterdir()] == ["pictures.npz"]


def test_the_end_of_a_single_video_is_held_out_for_the_tokenizer(tmp_path, capsys):
    write_video(tmp_path / "clips" / "only.mp4", [colours(1, 2 * k)[0] for k in range(100)], 16)
    words = (tmp_path / "clips", tmp_path / "out.npz", "--height", 16, "--width", 24, "--gap", 5)
    assert preprocess_vqvae.main([str(word) for word in words]) == 0
    assert "13 train and 5 val pictures" in capsys.readouterr().out
    with np.load(tmp_path / "out.npz") as arrays:
        # frames 0 to 60 and 75 to 95: the gap is from 63 to 75
        red = [arrays[split][..., 0].mean((1, 2)) for split in ("train", "val")]
        assert np.abs(red[0] - np.arange(0, 125, 10)).max() < 6
        assert np.abs(red[1] - np.arange(150, 200, 10)).max() < 6


def test_train_vqvae_without_held_out_pictures(pictures, tmp_path, monkeypatch, capsys):
    with np.load(pictures) as arrays:
        np.savez(tmp_path / "all.npz", train=arrays["train"], val=arrays["val"][:0])
    assert train(monkeypatch, tmp_path / "all.npz", tmp_path / "run", "STEPS=3", "VAL_STEPS=2") == 0
    assert "training without validation" in capsys.readouterr().err
    for name in ("best.pt", "last.pt"):
        assert checkpoint.load(tmp_path / "run" / name)["step"] == 3


def test_preprocess_vqvae_without_videos(tmp_path, capsys):
    assert preprocess_vqvae.main([str(tmp_path), str(tmp_path / "out.npz")]) == 2
    assert "holds no video" in capsys.readouterr().err


@pytest.fixture
def shown(tmp_path) -> Path:
    """A tokenizer for 48x32 pictures."""
    torch.manual_seed(0)
    tokenizer = VQVAE(VQVAEConfig(32, 48, 8, 4, 8, 1))
    checkpoint.save(tmp_path / "vqvae.pt", tokenizer_content(tokenizer))
    return tmp_path / "vqvae.pt"


def infer(tokenizer: Path, *words: object) -> int:
    """`python vq_vae/vq_vae_inference.py`, in this process; returns the exit status."""
    flags = ["--vqvae_ckpt", tokenizer, "--device", "cpu"]
    return vq_vae_inference.main([str(word) for word in (*flags, *words)])


def test_vq_vae_inference_shows_originals_above_reconstructions(pictures, shown, tmp_path, capsys):
    out = tmp_path / "new" / "sheet.png"
    assert infer(shown, "--out", out, "--pictures", pictures, "--count", 2) == 0
    with np.load(pictures) as arrays:
        val = arrays["val"]
    truth = torch.from_numpy(val[[0, 2]]).permute(0, 3, 1, 2).float() / 255
    tokenizer = load_tokenizer(shown)
    with torch.no_grad():
        expected = psnr(tokenizer.decode(tokenizer.encode(truth)), truth).mean().item()
    printed = capsys.readouterr().out
    assert f"2 pictures: mean PSNR {expected:.2f} dB" in printed and "of 8 codes used" in printed
    sheet = read_image(out)
    for i, original in enumerate(val[[0, 2]]):
        left = i * (sheet.shape[1] // 2)
        part = sheet[16 : 16 + 64, left : left + 96]
        assert np.array_equal(part, original.repeat(2, 0).repeat(2, 1)), "twice the size, under its label"


def test_vq_vae_inference_of_a_clip(shown, tmp_path, capsys):
    write_video(tmp_path / "walk.mp4", colours(10, 0), 16)
    flags = ("--out", tmp_path / "sheet.png", "--clip", tmp_path / "walk.mp4", "--count", 5)
    assert infer(shown, *flags) == 0
    assert "5 pictures: mean PSNR" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, message",
    [
        (["--clip", "none.mp4"], "none.mp4: no such video"),
        (["--pictures", "none.npz"], "none.npz"),
        (["--vqvae_ckpt", "none.pt"], "none.pt: no such checkpoint"),
    ],
)
def test_vq_vae_inference_errors_are_one_line(shown, capsys, words, message):
    assert infer(shown, *words) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("error: ") and message in error.splitlines()[-1]


def test_vq_vae_inference_needs_a_picture(shown, capsys):
    with pytest.raises(SystemExit, match="2"):
        infer(shown, "--count", 0)
    assert "--count: 0: expected a whole number, from 1 to" in capsys.readouterr().err
