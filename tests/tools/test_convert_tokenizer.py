"""tools/convert_tokenizer.py: component-wise checkpoints become tokenizers that give the same codes; whatever
does not fit exactly is refused."""

from pathlib import Path

import pytest
import torch
from conftest import tiny_vqvae

from runtime import checkpoint
from tools import convert_tokenizer
from vq_vae.tokenizer import Tokenizer, load_tokenizer, tokenizer_content
from vq_vae.vq_vae import VQVAE


def component_wise(model: VQVAE, old_codes: bool) -> dict:
    """A checkpoint as an earlier version wrote it."""
    quantizer = model.quantizer.state_dict()
    if old_codes:
        quantizer = {
            "embedding": quantizer["codebook"].T.contiguous(),
            "cluster_size": quantizer["ema_count"],
            "embedding_avg": quantizer["ema_sum"].T.contiguous(),
        }
    return {
        "epoch": 3,
        "encoder": model.encoder.state_dict(),
        "decoder": model.decoder.state_dict(),
        "quantizer": quantizer,
        "optimizer": {},
        "config": {"image_height": 16, "image_width": 32},
    }


def run(content: object, folder: Path, *words: str) -> int:
    torch.save(content, folder / "old.pt")
    return convert_tokenizer.main([str(folder / "old.pt"), str(folder / "new.pt"), *words])


@pytest.mark.parametrize("old_codes", [True, False])
def test_a_converted_tokenizer_gives_the_same_codes_and_pictures(tmp_path, old_codes):
    model = tiny_vqvae(seed=4)
    pictures = torch.rand(3, 3, 16, 32, generator=torch.Generator().manual_seed(0))
    model(pictures)  # seeds the codebook
    model.eval()
    assert run(component_wise(model, old_codes), tmp_path) == 0
    converted = load_tokenizer(tmp_path / "new.pt")
    assert converted.config == model.config
    codes = model.encode(pictures)
    assert len(codes.unique()) > 3 and torch.equal(converted.encode(pictures), codes)
    assert torch.equal(converted.decode(codes), Tokenizer(model).decode(codes))


def test_the_size_of_the_pictures_may_be_given_and_must_be_known(tmp_path, capsys):
    content = component_wise(tiny_vqvae(), True)
    del content["config"]
    assert run(content, tmp_path) == 2 and "give --height and --width" in capsys.readouterr().err
    assert run(content, tmp_path, "--height", "16", "--width", "32") == 0
    assert run(content, tmp_path, "--height", "16", "--width", "32") == 2, "exists"
    assert "exists; give a new file" in capsys.readouterr().err


def without(part: str, name: str):
    return lambda content: content[part].pop(name)


def with_tensor(part: str, name: str, *shape: int):
    return lambda content: content[part].update({name: torch.zeros(shape)})


@pytest.mark.parametrize(
    "spoil, message",
    [
        (without("decoder", "0.bias"), "decoder.0.bias is missing"),
        (with_tensor("encoder", "9.bias", 4), "encoder.9.bias is unknown"),
        (with_tensor("decoder", "0.bias", 5), r"decoder.0.bias is [5], expected [8]"),
        (with_tensor("encoder", "5.layers.1.weight", 2, 2), "encoder.5.layers.1.weight is [2, 2]"),
        (without("encoder", "2.weight"), "its encoder has not the layers of this project's tokenizer"),
        (with_tensor("quantizer", "more", 1), "expected a quantizer with embedding, cluster_size"),
        (lambda content: content.pop("decoder"), "expected the state dicts encoder, decoder and quantizer"),
        (
            lambda content: content.update(encoder={"res1.conv1.weight": torch.zeros(3)}),
            "train a tokenizer anew",
        ),
        (lambda content: content["encoder"].update({"0.bias": "text"}), "encoder.0.bias is no tensor"),
        (lambda content: content["encoder"]["0.bias"].fill_(torch.nan), "encoder.0.bias are not finite"),
        (lambda content: content.update(kind="vq_vae"), "which needs no conversion"),
    ],
)
def test_what_does_not_fit_exactly_is_refused(tmp_path, capsys, spoil, message):
    content = component_wise(tiny_vqvae(), True)
    spoil(content)
    assert run(content, tmp_path) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith(f"error: {tmp_path / 'old.pt'}: ") and error.count("\n") == 1
    assert not (tmp_path / "new.pt").exists()


def test_a_checkpoint_of_today_and_other_files_are_refused(tmp_path, capsys):
    checkpoint.save(tmp_path / "today.pt", tokenizer_content(tiny_vqvae()))
    words = [str(tmp_path / "today.pt"), str(tmp_path / "new.pt")]
    assert convert_tokenizer.main(words) == 2 and "needs no conversion" in capsys.readouterr().err
    assert run([1, 2], tmp_path) == 2 and "found list" in capsys.readouterr().err
