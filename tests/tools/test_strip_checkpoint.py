"""tools/strip_checkpoint.py: keeps what play needs and never writes over its input."""

import pytest
import torch
from conftest import TINY_WORLD, tiny_tokenizer

from model_convGru import ConvGRUWorldModel
from rollout.world_model import WORLD_KIND, load_world_model, world_content
from runtime import checkpoint
from tools import strip_checkpoint


@pytest.fixture
def trained(tmp_path):
    """A training checkpoint of a tiny world model."""
    torch.manual_seed(0)
    extra = {
        "step": 3,
        "optimizer": {"lr": 0.1},
        "scaler": {},
        "rng": {"cpu": torch.zeros(4)},
        "position": {},
    }
    model = ConvGRUWorldModel(TINY_WORLD, tiny_tokenizer())
    checkpoint.save(tmp_path / "world.pt", world_content(model, **extra))
    return tmp_path / "world.pt"


def test_keeps_what_play_needs(trained, tmp_path):
    assert strip_checkpoint.main([str(trained), str(tmp_path / "play.pt")]) == 0
    content = checkpoint.load(tmp_path / "play.pt", WORLD_KIND)
    assert not set(strip_checkpoint.TRAINING_ONLY) & content.keys()
    assert content["step"] == 3
    load_world_model(tmp_path / "play.pt", tiny_tokenizer())


def test_no_path_of_the_machine_stays(trained, tmp_path):
    content = checkpoint.load(trained)
    content["constants"] = {"DATA_DIRS": f"{tmp_path}/clips,tokens/mine", "LR": 1e-3, "OUT_DIR": "runs/world"}
    checkpoint.save(trained, content)
    assert strip_checkpoint.main([str(trained), str(tmp_path / "play.pt")]) == 0
    constants = checkpoint.load(tmp_path / "play.pt")["constants"]
    assert constants == {"DATA_DIRS": "clips,tokens/mine", "LR": 1e-3, "OUT_DIR": "runs/world"}


def test_missing_file_is_one_line(tmp_path, capsys):
    assert strip_checkpoint.main([str(tmp_path / "no.pt"), str(tmp_path / "out.pt")]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "no such checkpoint" in message


def test_never_writes_over_its_input(trained, capsys):
    before = trained.read_bytes()
    assert strip_checkpoint.main([str(trained), str(trained)]) == 2
    assert "is read by this run" in capsys.readouterr().err and trained.read_bytes() == before
