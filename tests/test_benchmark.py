"""benchmark.py: the plain step it compares with is the recipe's, FLOPs are counted, the script runs."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY_WORLD, tiny_tokenizer

import benchmark
import train
from benchmarking import loading, play
from benchmarking.measure import Task, in_turn, number
from model_convGru import ConvGRUWorldModel
from runtime.provenance import command_line
from training.convgru_window import convgru_window_loss

TINY = {
    benchmark: {
        "WINDOWS": 2,
        "QUICK_WINDOWS": 2,
        "QUICK_TRANSITIONS": 4,
        "SCALING": {"windows": (1, 2), "transitions": (2, 3), "hidden": (8,)},
        "MATMUL": {"cpu": (16, 32)},
        "PROCESSES": (1,),
        "RUN_STEPS": 8,
        "RUN_TRANSITIONS": 3,
    },
    loading: {"WINDOWS": 4, "FRAMES": 6, "CLIPS": 1},
    play: {"STEPS": 6, "BATCHES": (1, 2), "CONTEXT": 2},
}


def tiny_model() -> ConvGRUWorldModel:
    torch.manual_seed(3)
    return ConvGRUWorldModel(TINY_WORLD)


def test_the_reference_is_the_recipe_of_train(monkeypatch):
    """Loss of a window and gradient of every parameter, half of the last steps self-fed."""
    for name, value in train.RECIPES["v4.5.2"].items():
        monkeypatch.setattr(train, name, value)
    feeding = train.feeding(10_000, 6)
    assert feeding.ar_len == 5 and 0 < feeding.teacher_prob < 1
    torch.manual_seed(0)
    tokens, actions = torch.randint(64, (4, 7, 4, 8)), torch.rand(4, 6, 5) * 2 - 1
    ours, plain, tokenizer = tiny_model(), tiny_model(), tiny_tokenizer()
    torch.manual_seed(1)
    result = convgru_window_loss(
        ours, StepLoss(tokenizer, None, train.loss_weights()), tokens, actions, feeding
    )
    torch.manual_seed(1)
    loss = benchmark.reference_step(plain, tokenizer, tokens, actions, feeding.ar_len, feeding.teacher_prob)
    assert result.self_fed.any() and not result.self_fed[1:].all()
    torch.testing.assert_close(result.loss, loss)
    result.loss.backward()
    loss.backward()
    others = dict(plain.named_parameters())
    for name, parameter in ours.named_parameters():
        assert parameter.grad.abs().sum() > 0
        torch.testing.assert_close(parameter.grad, others[name].grad, rtol=1e-4, atol=1e-6, msg=name)


def test_what_is_timed_is_the_recipe_of_train(monkeypatch):
    for name, value in train.RECIPES["v4.5.2"].items():
        monkeypatch.setattr(train, name, value)
    assert train.loss_weights() == benchmark.WEIGHTS
    feeding = train.feeding(10_000, train.SEQ_LEN)
    assert (feeding.ar_len, feeding.teacher_prob) == (benchmark.AR_LEN, benchmark.TEACHER_PROB)
    assert feeding.sampling.greedy and feeding.token_noise == feeding.latent_noise == 0
    sizes = {"embed_dim": train.EMBED_DIM, "hidden_dim": train.HIDDEN_DIM, "layers": train.LAYERS}
    assert sizes == benchmark.FULL_SIZE
    timed = (benchmark.TRANSITIONS, benchmark.WINDOWS, benchmark.LR, benchmark.GRAD_CLIP)
    assert timed == (train.SEQ_LEN, train.BATCH_SIZE, train.LR, train.GRAD_CLIP)


def test_flops():
    a, b = torch.rand(3, 5), torch.rand(5, 7)
    assert benchmark.flops(lambda: a @ b) == 2 * 3 * 5 * 7
    one, three = (benchmark.training_flops(Task(TINY_WORLD, n, 4), tiny_tokenizer()) for n in (1, 3))
    assert three == 3 * one > 0
    # At least the recurrent convolutions of the forward pass, and more than twice that with the backward.
    cells, c = 4 * 8 * 4 * TINY_WORLD.layers, TINY_WORLD.hidden_dim
    assert one > 3 * cells * 2 * 9 * 2 * c * (2 * c + c) * 0.9


def test_what_is_compared_runs_in_turn():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "AB"}
    taken = in_turn(calls, 3, torch.device("cpu"), "test")
    assert "".join(order) == "ABABABAB" and [len(s) for s in taken.values()] == [3, 3]


def test_numbers_are_short():
    assert [number(x) for x in (0.012345, 9.876, 123.4, 23456.7)] == ["0.0123", "9.88", "123", "23,457"]


PROMISED = {
    "train": [
        "train.plain.speedup",
        "train.plain.flops_per_step",
        "train.plain.matmul_flops_per_s",
        *(
            f"train.plain.{kind}.{key}"
            for kind in ("ours", "reference")
            for key in ("frames_per_s", "steps_per_hour", "mfu", "peak_mb")
        ),
        *(
            f"train.scaling.{key}.frames_per_s"
            for key in ("windows1", "windows2", "transitions2", "transitions3", "hidden8")
        ),
        "train.processes1.frames_per_s",
        "train.geometry.shown.frames_per_s",
        "train.geometry.self_fed.frames_per_s",
    ],
    "data": [
        "data.loader.frames_per_s",
        "data.naive.frames_per_s",
        "data.speedup",
        *(
            f"data.preprocess.{s}.frames_per_s"
            for s in ("decode", "resize", "encode_float32", "write", "all")
        ),
    ],
    "play": [
        *(
            f"play.float32.threads1.{key}"
            for key in ("frames_per_s", "p50_ms", "p95_ms", "p99_ms", *(f"{p}_ms" for p in play.PARTS))
        ),
        "play.batch1.frames_per_s",
        "play.batch2.frames_per_s",
        "play.first_frame_s",
        "play.resident_mb",
    ],
}


@pytest.mark.parametrize("section", PROMISED)
def test_the_script_writes_what_it_promises(section, tiny, tmp_path, monkeypatch, capsys):
    for module, values in TINY.items():
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    out = tmp_path / "new" / "benchmark.json"
    benchmark.main(
        [section, "--quick", "--out", str(out), "--data_dir", str(tiny.tokens.parent), *tiny.flags]
    )
    written = json.loads(out.read_text())
    assert set(PROMISED[section]) <= set(written["metrics"])
    for name, value in written["metrics"].items():
        assert math.isfinite(value) and value > 0, name
    meta = written["meta"]
    assert meta["command"].startswith(f"python benchmark.py {section} --quick --out benchmark.json")
    assert str(tmp_path) not in out.read_text()
    assert {"commit", "machine", "versions", "device", "threads", "precision", "notes"} <= set(meta)
    assert {"python", "torch", "numpy", "opencv"} <= set(meta["versions"])
    said = capsys.readouterr().out
    assert "\n|---|" in said and "wrote benchmark.json" in said


def test_bad_input_is_one_line(tiny, tmp_path, capsys):
    for flags, part in (
        (["--checkpoint", "gone.pt"], "gone.pt: no such checkpoint"),
        (["data", "--data_dir", str(tmp_path)], "manifest.json: no manifest"),
        (["--out", str(tiny.world / "b.json")], "world.pt"),
    ):
        with pytest.raises(SystemExit) as end:
            benchmark.main([*tiny.flags, *flags])
        err = capsys.readouterr().err
        assert end.value.code == 2 and err.count("error: ") == 1 and part in err, err


def test_sizes_that_would_fill_the_memory_are_left_out(monkeypatch):
    monkeypatch.setattr(benchmark, "SCALING", {"windows": (1, 8)})
    monkeypatch.setattr(benchmark.psutil, "virtual_memory", lambda: SimpleNamespace(available=100e6))
    world = SimpleNamespace(tokenizer=tiny_tokenizer(), device=torch.device("cpu"), dtype=torch.float32)
    notes: list[str] = []
    args = SimpleNamespace(quick=False, repeats=1)
    found = benchmark.scaling(args, world, Task(TINY_WORLD, 1, 2), 10.0, notes)
    assert list(found) == ["train.scaling.windows1.frames_per_s"]
    assert notes == ["train.scaling.windows8: left out, it takes about 80 MB"]


def test_commands_name_no_private_place(tmp_path):
    words = command_line(
        benchmark.__file__, ["train", str(tmp_path / "x y.json"), f"--out={tmp_path}/b.json"]
    )
    assert words == "python benchmark.py train 'x y.json' --out=b.json"
