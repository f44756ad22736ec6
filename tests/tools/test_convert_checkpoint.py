"""tools/convert_checkpoint.py: a 0.5 checkpoint becomes a 0.6 one with the same weights."""

import pytest
import torch
from conftest import tiny_tokenizer

from model_geometry import GeometryConfig, GeometryWorldModel
from rollout.world_model import WORLD_KIND, load_world_model, world_content
from runtime import checkpoint
from tools import convert_checkpoint

CONFIG = GeometryConfig(64, 4, 8, 16, 32, channels=8, coarse_channels=8, code_dim=4, motion_dim=8)


def old_name(name: str) -> str:
    """The name that a parameter of version 0.6 had in 0.5."""
    for old, new in convert_checkpoint.PARAMETERS.items():
        if name == new or name.startswith(new + "."):
            return old + name.removeprefix(new)
    return name


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = GeometryWorldModel(CONFIG, tiny_tokenizer())
    model.init_from_codebook()
    return model


@pytest.fixture
def old(model, tmp_path):
    """The model's checkpoint as version 0.5 wrote it."""
    content = world_content(model, constants={"REVEAL": 0.5, "ROTATE": True, "LR": 1e-3})
    content["model"] = {old_name(name): tensor for name, tensor in content["model"].items()}
    content["config"] |= dict.fromkeys(convert_checkpoint.REMOVED_SWITCHES, True)
    checkpoint.save(tmp_path / "old.pt", content)
    return tmp_path / "old.pt"


def test_weights_stay_the_same(old, model, tmp_path, capsys):
    assert convert_checkpoint.main([str(old), str(tmp_path / "new.pt")]) == 0
    loaded, content = load_world_model(tmp_path / "new.pt", tiny_tokenizer())
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert content["constants"] == {"MASKED_DECODING": 0.5, "LR": 1e-3}


def test_loader_names_the_converter(old):
    with pytest.raises(checkpoint.CheckpointError, match=r"old\.pt: .*convert_checkpoint\.py .*old\.pt"):
        load_world_model(old, tiny_tokenizer())


def test_refuses_what_it_cannot_convert(old, tmp_path, capsys):
    content = checkpoint.load(old, WORLD_KIND)
    content["config"]["move"] = False
    checkpoint.save(tmp_path / "switched_off.pt", content)
    assert convert_checkpoint.main([str(tmp_path / "switched_off.pt"), str(tmp_path / "new.pt")]) == 2
    assert "move switched off" in capsys.readouterr().err
    assert convert_checkpoint.main([str(old), str(tmp_path / "new.pt")]) == 0
    assert convert_checkpoint.main([str(tmp_path / "new.pt"), str(tmp_path / "newer.pt")]) == 2
    assert "nothing to convert" in capsys.readouterr().err
    assert convert_checkpoint.main([str(old), str(old)]) == 2 and checkpoint.load(old)
