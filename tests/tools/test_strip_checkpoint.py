"""tools/strip_checkpoint.py: keeps what play needs and never writes over its input."""

import pytest
import torch
from conftest import TINY_WORLD, tiny_tokenizer, tiny_vqvae

from model_convGru import ConvGRUWorldModel
from rollout.world_model import WORLD_KIND, load_world_model, world_content
from runtime import checkpoint
from tools import strip_checkpoint
from vq_vae.tokenizer import load_tokenizer, tokenizer_content


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


def test_half_of_the_size_and_nearly_the_same_weights(trained, tmp_path):
    """The world reads them as float32 again; buffers of other types are as they were."""
    whole, half = tmp_path / "play.pt", tmp_path / "half.pt"
    strip_checkpoint.main([str(trained), str(whole)])
    assert strip_checkpoint.main([str(trained), str(half), "--half"]) == 0
    assert half.stat().st_size < 0.6 * whole.stat().st_size
    (a, _), (b, _) = (load_world_model(path, tiny_tokenizer()) for path in (whole, half))
    for name, tensor in a.state_dict().items():
        assert b.state_dict()[name].dtype == tensor.dtype
        torch.testing.assert_close(b.state_dict()[name], tensor, rtol=2**-8, atol=0)


def test_half_of_a_tokenizer_keeps_its_tokens(tmp_path):
    """Only its decoder is rounded, and its checksum is that of the rounded weights."""
    vqvae = tiny_vqvae()
    checkpoint.save(tmp_path / "vqvae.pt", tokenizer_content(vqvae))
    assert strip_checkpoint.main([str(tmp_path / "vqvae.pt"), str(tmp_path / "half.pt"), "--half"]) == 0
    before, after = (load_tokenizer(tmp_path / name) for name in ("vqvae.pt", "half.pt"))
    assert after.fingerprint == before.fingerprint and after.checksum != before.checksum
    pictures = torch.rand(4, 3, vqvae.config.height, vqvae.config.width)
    tokens = before.encode(pictures)
    assert torch.equal(after.encode(pictures), tokens)
    torch.testing.assert_close(after.decode(tokens), before.decode(tokens), rtol=0, atol=0.02)


def test_weights_that_were_not_trained_stay_those_of_the_base(trained, tmp_path):
    content = checkpoint.load(trained)
    name, base = "head.bias", tmp_path / "base.pt"
    checkpoint.save(base, content)
    content["model"] = {**content["model"], name: content["model"][name] + 0.123456}
    checkpoint.save(trained, content)
    made = tmp_path / "play.pt"
    assert strip_checkpoint.main([str(trained), str(made), "--half", "--base", str(base)]) == 0
    before, after = (checkpoint.load(path)["model"] for path in (base, made))
    assert after[name].dtype == torch.bfloat16
    assert all(torch.equal(after[other], before[other]) for other in before if other != name)
    for wrong in (
        [str(made), str(base), "--half", "--base", str(base)],
        [str(made), "x.pt", "--base", "b.pt"],
    ):
        try:
            assert strip_checkpoint.main(wrong) == 2
        except SystemExit as error:  # of the parser
            assert error.code == 2
    assert checkpoint.load(base)["model"].keys() == before.keys()


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
