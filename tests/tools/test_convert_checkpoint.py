"""tools/convert_checkpoint.py: geometry worlds of 0.5 and 0.6 become starts for training in 0.7."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_tokenizer, tiny_vqvae

from depth.predictor import load_depth
from model_geometry import GeometryConfig, GeometryWorldModel
from rollout.world_model import WORLD_KIND, load_world_model, world_content
from runtime import checkpoint
from tools import convert_checkpoint
from vq_vae.tokenizer import tokenizer_content

C, D = 8, 4  # channels, dimensions of the code space
CONFIG = GeometryConfig(64, 4, 8, 16, 32, channels=C, coarse_channels=8, code_dim=D, motion_dim=8)
NEW_PARTS = ("blocks.", "fine_block.", "conditioning_block.")


def weights_of_06() -> dict[str, torch.Tensor]:
    """Random parameters with the names and shapes of version 0.6."""
    torch.manual_seed(0)
    model = GeometryWorldModel(CONFIG, tiny_tokenizer(), load_depth())
    model.init_from_codebook()
    weights = {n: w for n, w in model.state_dict().items() if not n.startswith(NEW_PARTS)}
    weights |= {"gate_bias": torch.randn(3), "log_scale": torch.randn(2)}
    weights |= {"in_proj.weight": torch.randn(C, 2 * D + 8, 1, 1)}
    outputs = 2 + 2 * D + C
    weights |= {"out_proj.weight": torch.randn(outputs, C, 1, 1), "out_proj.bias": torch.randn(outputs)}
    sizes = {"decoding_block": [(C + D + 1, C), (C, C)], "depth_head": [(C + D + 1, C), (C, C), (C, 4)]}
    for name, convolutions in sizes.items():
        for i, (a, b) in enumerate(convolutions):
            weights[f"{name}.{2 * i}.weight"] = torch.randn(b, a, 3, 3)
            weights[f"{name}.{2 * i}.bias"] = torch.randn(b)
    return weights


def name_in_05(name: str) -> str:
    """The name that a parameter of version 0.6 had in 0.5."""
    for old, new in convert_checkpoint.PARAMETERS.items():
        if name == new or name.startswith(new + "."):
            return old + name.removeprefix(new)
    return name


def write_old(path: Path, version: str, **changes) -> Path:
    """A checkpoint as version 0.5 or 0.6 wrote it."""
    model = GeometryWorldModel(CONFIG, tiny_tokenizer(), load_depth())
    content = world_content(model, data={"fps": 8.0}, constants={"LR": 1e-3}, step=7, optimizer={})
    del content["depth"], content["config"]["heads"]
    content["config"] |= {"sources": 2}
    content["model"] = weights_of_06()
    if version == "0.5":
        content["model"] = {name_in_05(name): tensor for name, tensor in content["model"].items()}
        content["config"] |= dict.fromkeys(convert_checkpoint.REMOVED_SWITCHES, True)
    content["config"] |= changes
    checkpoint.save(path, content)
    return path


@pytest.fixture
def tokenizer(tmp_path) -> Path:
    checkpoint.save(tmp_path / "vqvae.pt", tokenizer_content(tiny_vqvae()))
    return tmp_path / "vqvae.pt"


def converted(source: Path, tokenizer: Path) -> tuple[GeometryWorldModel, dict]:
    target = source.with_name("new.pt")
    assert convert_checkpoint.main([str(source), str(target), "--vqvae_ckpt", str(tokenizer)]) == 0
    return load_world_model(target, tiny_tokenizer())


@pytest.mark.parametrize("version", ["0.5", "0.6"])
def test_what_both_have_is_copied(version, tokenizer, tmp_path):
    model, content = converted(write_old(tmp_path / "old.pt", version), tokenizer)
    old, new = weights_of_06(), model.state_dict()
    shared = [name for name in old if name in new and old[name].shape == new[name].shape]
    assert len(shared) > 40 and all(torch.equal(old[name], new[name]) for name in shared)
    assert {n for n in new if n not in shared and not n.startswith(NEW_PARTS)} == {
        "in_proj.weight", "out_proj.weight", "out_proj.bias", "gate_bias", "log_scale"
    }  # fmt: skip
    assert content["data"] == {"fps": 8.0} and content["config"]["sources"] == GeometryConfig.sources
    assert not {"optimizer", "constants", "step"} & set(content), "it is a start, not a run to resume"


@torch.no_grad()
def test_two_equal_views_give_what_one_composed_view_does(tokenizer, tmp_path):
    """The old network, given the same view from the last frame and from the keyframes, had the same features
    and the mean of its two gates and corrections."""
    model, _ = converted(write_old(tmp_path / "old.pt", "0.6"), tokenizer)
    old = weights_of_06()
    z, features = torch.randn(2, D, 4, 8), torch.randn(2, C, 4, 8)
    visible, exact, generation, distance, ground = torch.rand(5, 2, 1, 4, 8)
    zero = torch.zeros_like(visible)
    before = [z, z, visible, exact, visible, exact, zero, generation, distance, ground]
    after = [z, visible, exact, zero, zero, generation, distance, ground]
    torch.testing.assert_close(
        model.in_proj(torch.cat(after, 1)),
        F.conv2d(torch.cat(before, 1), old["in_proj.weight"], old["in_proj.bias"]),
    )
    out = F.conv2d(features, old["out_proj.weight"], old["out_proj.bias"])
    gates, one, other, query = out.split([2, D, D, C], 1)
    gate, correction, same_query = model.out_proj(features).split([1, D, C], 1)
    torch.testing.assert_close(gate, gates.mean(1, keepdim=True))
    torch.testing.assert_close(correction, (one + other) / 2)
    torch.testing.assert_close(same_query, query)
    assert model.gate_bias.tolist() == [old["gate_bias"][0].item(), 0.0]
    assert model.log_scale.item() == pytest.approx(old["log_scale"].mean().item())


@torch.no_grad()
def test_new_blocks_start_as_the_identity(tokenizer, tmp_path):
    model, _ = converted(write_old(tmp_path / "old.pt", "0.6"), tokenizer)
    old = weights_of_06()
    x = torch.randn(2, C, 4, 8)
    assert torch.equal(model.fine_block(x), x)
    for i, grid in enumerate([(2, 4), (1, 2)]):
        coarse = torch.randn(2, 8, *grid)
        assert torch.equal(model.blocks[i](coarse), coarse)
    given = torch.randn(2, C + D + 1, 4, 8)
    hidden = F.silu(F.conv2d(given, old["decoding_block.0.weight"], old["decoding_block.0.bias"], padding=1))
    expected = F.conv2d(hidden, old["decoding_block.2.weight"], old["decoding_block.2.bias"], padding=1)
    torch.testing.assert_close(model.conditioning_block(given), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("version", ["0.5", "0.6"])
def test_loader_names_the_converter(version, tmp_path):
    old = write_old(tmp_path / "old.pt", version)
    with pytest.raises(checkpoint.CheckpointError, match=r"old\.pt: .*convert_checkpoint\.py .*old\.pt"):
        load_world_model(old, tiny_tokenizer())


def test_refuses_what_it_cannot_convert(tokenizer, tmp_path, capsys):
    def refused(source: Path, target: Path, *flags: str) -> str:
        words = [str(source), str(target), "--vqvae_ckpt", str(tokenizer), *flags]
        assert convert_checkpoint.main(words) == 2
        return capsys.readouterr().err

    off = write_old(tmp_path / "off.pt", "0.5", move=False)
    assert "move switched off" in refused(off, tmp_path / "new.pt")
    old = write_old(tmp_path / "old.pt", "0.6")
    checkpoint.save(tmp_path / "other.pt", tokenizer_content(tiny_vqvae(seed=1)))
    message = refused(old, tmp_path / "new.pt", "--vqvae_ckpt", str(tmp_path / "other.pt"))
    assert "--vqvae_ckpt" in message and "old.pt belongs to tokenizer" in message
    assert not (tmp_path / "new.pt").exists()
    converted(old, tokenizer)
    assert "nothing to convert" in refused(tmp_path / "new.pt", tmp_path / "newer.pt")
    assert "exists" in refused(old, old) and checkpoint.load(old, WORLD_KIND)["step"] == 7
