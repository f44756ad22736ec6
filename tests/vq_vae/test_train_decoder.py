"""A sharper decoder for a frozen tokenizer: the same pictures at first, the same tokens always."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from runtime import checkpoint
from runtime.checkpoint import CheckpointError
from vq_vae import train_decoder
from vq_vae.discriminator import Discriminator, discriminator_loss
from vq_vae.tokenizer import Tokenizer, load_tokenizer, tokenizer_content
from vq_vae.vq_vae import SHUFFLE, VQVAE, VQVAEConfig, with_shuffle_decoder

TINY = [
    *("STEPS=6", "BATCH_SIZE=2", "VAL_PICTURES=2", "LOG_STEPS=2", "VAL_STEPS=4"),
    *("WARMUP_STEPS=2", "FINE_BLOCKS=1", "DEVICE=cpu", "PRECISION=fp32", "WANDB=disabled", "LR=1e-3"),
    "FINAL_LR_FACTOR=1.0",
]


def tokenizer_of(height: int = 32, width: int = 48) -> VQVAE:
    """A small tokenizer with random weights, and a codebook whose codes are all used."""
    torch.manual_seed(0)
    model = VQVAE(VQVAEConfig(height, width, 16, 4, 16, 1)).eval()
    model.quantizer._seed(model.encoder(torch.rand(4, 3, height, width)).movedim(1, -1).reshape(-1, 4))
    model.quantizer.initialised.fill_(True)
    return model


@pytest.fixture
def files(tmp_path) -> tuple[Path, Path]:
    """A tokenizer file, and pictures of 48x32 as preprocess_vqvae.py writes them."""
    checkpoint.save(tmp_path / "vqvae.pt", tokenizer_content(tokenizer_of()))
    blocks = np.random.default_rng(0).integers(0, 256, (12, 8, 12, 3), dtype=np.uint8)
    blocks = blocks.repeat(4, 1).repeat(4, 2)
    np.savez(tmp_path / "pictures.npz", train=blocks[:9], val=blocks[9:])
    return tmp_path / "vqvae.pt", tmp_path / "pictures.npz"


def train(monkeypatch, files: tuple[Path, Path], out: Path, *words: str) -> int:
    """`python vq_vae/train_decoder.py` with small settings, in this process; returns the exit status."""
    given = {word.partition("=")[0] for word in words}
    usual = [f"INIT_FROM={files[0]}", f"PICTURES={files[1]}", f"OUT_DIR={out}", *TINY]
    usual = [word for word in usual if word.partition("=")[0] not in given]
    monkeypatch.setattr(sys, "argv", ["train_decoder.py", *usual, *words])
    return train_decoder.main()


@torch.no_grad()
@pytest.mark.parametrize("fine_blocks", [0, 2])
def test_pixel_shuffles_start_as_the_transposed_convolutions_that_they_replace(fine_blocks):
    model = tokenizer_of()
    other = with_shuffle_decoder(model, fine_blocks).eval()
    tokens = torch.randint(0, 16, (3, *model.config.latent_size))
    expected = model.decode_code(tokens)
    assert expected.std() > 1e-3, "not one colour"
    torch.testing.assert_close(other.decode_code(tokens), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(Tokenizer(other).decode(tokens), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="no transposed convolutions"):
        with_shuffle_decoder(other, 1)


@torch.no_grad()
def test_an_output_pixel_of_a_shuffle_reads_inputs_that_a_transposed_one_does_not():
    """Else the pattern of the transposed convolution could not be unlearnt."""
    other = with_shuffle_decoder(tokenizer_of(), 0)
    convolution = other.decoder[-2][0]
    unread = convolution.weight == 0
    assert unread.float().mean() == pytest.approx(1 - 4 / 9)
    assert convolution.weight.requires_grad


def test_discriminator_loss_by_hand():
    recorded, reconstructed = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 1.0])
    assert discriminator_loss(recorded, reconstructed).item() == pytest.approx((0.25 + 1.0) / 2)


def test_scores_of_pixels_and_of_each_level_of_features():
    torch.manual_seed(0)
    net = Discriminator([5, 6, 7, 8])
    pictures = torch.rand(2, 3, 32, 48)
    features = [
        torch.randn(2, 5, 16, 24),
        torch.randn(2, 6, 8, 12),
        torch.randn(2, 7, 4, 6),
        torch.randn(2, 8, 2, 3),
    ]
    scores = net(pictures, features)
    assert scores.shape == (2, 8 * 12 + 8 * 12 + 4 * 6 + 2 * 3)
    for level in range(4):
        changed = [f.clone() for f in features]
        changed[level] += 1
        assert torch.equal(net(pictures, changed), scores) == (level == 3), "the last one is not used"
    assert not torch.equal(net(pictures.flip(0), features), scores)


def test_a_discriminator_learns_to_tell_blurred_pictures(one_thread):
    """It must see a lack of contrast, which a normalization would hide."""
    torch.manual_seed(0)
    net = Discriminator([])
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    for _ in range(60):
        sharp = torch.rand(4, 3, 32, 32)
        blurred = torch.nn.functional.avg_pool2d(sharp, 3, 1, 1)
        loss = discriminator_loss(net(sharp, []), net(blurred, []))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.3


def test_the_adversarial_gradient_has_the_given_share():
    pictures = torch.rand(2, 3, 8, 8, requires_grad=True)
    likeness, adversarial = (pictures**2).mean(), 1000 * pictures[:, :, 0].sum()
    alone = train_decoder.combined_gradient(pictures, likeness, None, 0.5)
    torch.testing.assert_close(alone, 2 * pictures.detach() / pictures.numel())
    added = train_decoder.combined_gradient(pictures, likeness, adversarial, 0.5) - alone
    assert (added.norm() / alone.norm()).item() == pytest.approx(0.5, rel=1e-3)
    assert not added[:, :, 1:].any() and (added[:, :, 0] > 0).all()


def test_a_trained_decoder_belongs_to_the_same_tokens(files, tmp_path, monkeypatch):
    assert train(monkeypatch, files, tmp_path / "run") == 0
    before, after = load_tokenizer(files[0]), load_tokenizer(tmp_path / "run" / "best.pt")
    assert after.fingerprint == before.fingerprint == before.checksum != after.checksum
    assert after.config.upsampling == SHUFFLE and after.config.fine_blocks == 1
    pictures = torch.rand(4, 3, 32, 48)
    assert torch.equal(after.encode(pictures), before.encode(pictures))
    tokens = before.encode(pictures)
    assert not torch.allclose(after.decode(tokens), before.decode(tokens), atol=1e-3), "it was trained"
    again = tmp_path / "again"
    words = (f"INIT_FROM={tmp_path / 'run' / 'best.pt'}", "FINE_BLOCKS=3")
    assert train(monkeypatch, files, again, *words) == 0, "goes on from a trained one, with its blocks"
    assert load_tokenizer(again / "best.pt").config.fine_blocks == 1
    assert load_tokenizer(again / "best.pt").fingerprint == before.fingerprint


def test_a_changed_decoder_is_noticed(files, tmp_path, monkeypatch):
    train(monkeypatch, files, tmp_path / "run")
    content = checkpoint.load(tmp_path / "run" / "best.pt")
    content["model"]["decoder.0.bias"] += 1
    checkpoint.save(tmp_path / "changed.pt", content)
    with pytest.raises(CheckpointError, match="changed after it was written"):
        load_tokenizer(tmp_path / "changed.pt")


def test_a_resumed_run_ends_with_the_weights_of_an_unbroken_one(
    files, tmp_path, monkeypatch, capsys, one_thread
):
    train(monkeypatch, files, tmp_path / "a", "STEPS=3", "ADVERSARIAL_START=0.0")
    train(monkeypatch, files, tmp_path / "a", "ADVERSARIAL_START=0.0")
    assert "at step 3" in capsys.readouterr().out
    train(monkeypatch, files, tmp_path / "b", "ADVERSARIAL_START=0.0")
    a, b = (checkpoint.load(tmp_path / run / "last.pt") for run in "ab")
    assert a["step"] == b["step"] == 6
    for group in ("model", "discriminator"):
        for name in a[group]:
            assert torch.equal(a[group][name], b[group][name]), name


def test_the_tokenizer_that_it_starts_from_is_not_overwritten(files, tmp_path, monkeypatch, capsys):
    (tmp_path / "run").mkdir()
    source = tmp_path / "run" / "best.pt"
    source.write_bytes(files[0].read_bytes())
    assert train(monkeypatch, files, tmp_path / "run", f"INIT_FROM={source}") == 2
    assert re.search(r"best\.pt", capsys.readouterr().err)
    assert source.read_bytes() == files[0].read_bytes()


def test_without_held_out_pictures(files, tmp_path, monkeypatch, capsys):
    with np.load(files[1]) as arrays:
        np.savez(tmp_path / "all.npz", train=arrays["train"], val=arrays["val"][:0])
    assert train(monkeypatch, (files[0], tmp_path / "all.npz"), tmp_path / "run") == 0
    assert "training without validation" in capsys.readouterr().err
    assert checkpoint.load(tmp_path / "run" / "best.pt")["step"] == 6
