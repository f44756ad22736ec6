"""Several processes: what works without torchrun."""

import torch

from training import distributed


def test_each_process_has_its_own_random_numbers(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    numbers = []
    for rank, step in ((1, 0), (2, 0), (1, 1), (1, 0)):
        monkeypatch.setenv("RANK", str(rank))
        distributed.reseed(7, step)
        numbers.append(torch.rand(()).item())
    assert len(set(numbers[:3])) == 3 and numbers[3] == numbers[0]
    monkeypatch.setenv("RANK", "0")
    before = torch.get_rng_state()
    distributed.reseed(7, 0)
    assert torch.equal(torch.get_rng_state(), before), "the first process keeps its generator"


def test_a_schedulers_variables_alone_do_not_count(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert (distributed.rank(), distributed.size()) == (0, 1)
    assert distributed.start("auto") == "auto"
