"""rollout/code_balance.py: codes stay as frequent as they were recorded."""

import pytest
import torch
from conftest import TINY_WORLD, tiny_tokenizer

from model_convGru import ConvGRUWorldModel
from rollout.code_balance import (
    BANDS,
    EVEN_SHARE,
    FRAMES,
    MAX_SHIFT,
    NEIGHBOURS,
    SELDOM,
    CodeBalance,
    count_codes,
    elevation_bands,
    similarity,
)
from rollout.rollout import Rollout
from rollout.sampling import SamplingConfig

CODES = 64


@pytest.fixture
def codebook() -> torch.Tensor:
    return torch.randn(CODES, 4, generator=torch.Generator().manual_seed(0)) * 10


def recorded_frames() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and bands [2, 3, 6, 8]: two rows of each band, the sky at the top."""
    tokens = torch.randint(0, CODES, (2, 3, 6, 8), generator=torch.Generator().manual_seed(1))
    bands = torch.tensor([2, 2, 1, 1, 0, 0])[:, None].expand(2, 3, 6, 8)
    return tokens, bands


def test_codes_are_counted_in_their_bands():
    tokens = torch.tensor([[[0, 0], [1, 3]], [[2, 2], [2, 2]]])
    bands = torch.tensor([[[2, 2], [0, 2]], [[1, 1], [1, 1]]])
    counts = count_codes(tokens, bands, 4)
    assert counts[0].tolist() == [[0, 1, 0, 0], [0, 0, 0, 0], [2, 0, 0, 1]]
    assert counts[1].tolist() == [[0, 0, 0, 0], [0, 0, 4, 0], [0, 0, 0, 0]]


def test_bands_follow_the_pitch():
    pose = torch.zeros(3, 5)
    pose[:, 4] = torch.tensor([0.0, -60.0, 60.0])  # level, up, down
    bands = elevation_bands(pose, 18, 32, 70.0)
    assert bands.shape == (3, 18, 32)
    assert (bands[0, 0] == 2).all() and (bands[0, -1] == 0).all() and bands[0, 9, 16] == 1
    assert (bands[1] == 2).all() and (bands[2] == 0).all()


def test_similar_codes_share_their_frequency(codebook):
    similar = similarity(codebook)
    assert torch.allclose(similar.sum(1), torch.ones(CODES))
    order = torch.cdist(codebook, codebook).argsort(1)
    assert torch.equal(similar.argsort(1, descending=True)[:, :NEIGHBOURS], order[:, :NEIGHBOURS])
    # Codebooks of any size, also one in which all codes are equal.
    assert torch.allclose(similarity(codebook[:3]).sum(1), torch.ones(3))
    assert torch.allclose(similarity(torch.zeros(5, 2)), torch.full((5, 5), 0.2))


def test_the_shift_is_zero_until_the_codes_differ(codebook):
    tokens, bands = recorded_frames()
    balance = CodeBalance.of_recorded(tokens, bands, codebook)
    assert torch.allclose(balance.recorded.sum(2), torch.ones(2, BANDS), atol=1e-5)
    assert torch.equal(balance.shift(bands[:, 0]), torch.zeros(2, 6, 8, CODES))
    for t in range(3):  # all recorded frames once: the mean stays nearly where it is
        balance = balance.after(tokens[:, t], bands[:, t])
    once = balance.shift(bands[:, 0]).abs().max()
    for _ in range(100):
        balance = balance.after(tokens[:, 0], bands[:, 0])
    assert balance.shift(bands[:, 0]).abs().max() > 5 * once


def test_a_code_that_is_too_frequent_is_sampled_less_and_others_more(codebook):
    tokens, bands = recorded_frames()
    tokens[0, 0, 0, :4] = 5
    start = balance = CodeBalance.of_recorded(tokens, bands, codebook)
    shown = tokens[:, 0].clone()
    shown[0, :2] = 5  # the sky of the first world
    for _ in range(12 * FRAMES):
        balance = balance.after(shown, bands[:, 0])
    shift = balance.shift(bands[:, 0])
    sky, strength = shift[0, 0, 0], 16 / (16 + SELDOM)  # 16 cells of the sky in each frame
    assert sky.argmin() == 5 and sky[5] < -0.4
    unlike = torch.cdist(codebook[5:6], codebook)[0].topk(CODES // 2).indices
    found = unlike[(tokens[0, :, :2].flatten()[:, None] == unlike).any(0)]
    assert len(found) > 5 and (sky[found] > 0.4).all()
    assert shift.abs().max() <= MAX_SHIFT * strength
    # The log of the ratio of two distributions, each with a share that is spread evenly.
    even = EVEN_SHARE / CODES
    ratio = (balance.recorded[0, 2, 5] + even) / (balance.generated[0, 2, 5] + even)
    assert sky[5].item() == pytest.approx(strength * ratio.log().item(), abs=1e-5)
    # Nothing is changed in place.
    assert torch.equal(start.shift(bands[:, 0]), torch.zeros(2, 6, 8, CODES))


def test_what_is_not_seen_keeps_its_frequencies(codebook):
    tokens, bands = recorded_frames()
    start = balance = CodeBalance.of_recorded(tokens, bands, codebook)
    only_sky = torch.full((2, 6, 8), 2)
    for _ in range(50):
        balance = balance.after(tokens[:, 0], only_sky)
    assert torch.equal(balance.generated[:, :2], start.generated[:, :2])
    assert not torch.allclose(balance.generated[:, 2], start.generated[:, 2], atol=1e-3)
    # A band that was never recorded is not shifted, whatever the rollout shows there.
    unknown = CodeBalance.of_recorded(tokens, torch.full_like(tokens, 2), codebook)
    for _ in range(5):
        unknown = unknown.after(tokens[:, 0], torch.zeros_like(only_sky))
    assert torch.equal(unknown.shift(torch.zeros_like(only_sky)), torch.zeros(2, 6, 8, CODES))


def test_a_model_that_prefers_a_code_keeps_the_recorded_ones():
    torch.manual_seed(0)
    model = ConvGRUWorldModel(TINY_WORLD, tiny_tokenizer()).eval()
    tokens = torch.randint(0, 8, (2, 6, 4, 8), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        model.head.bias[40] += 5.0
    share = {}
    for balance in (0.0, 1.0):
        rollout = Rollout(model, SamplingConfig(code_balance=balance))
        rollout.prime(tokens, torch.zeros(2, 5, 5))
        made = rollout.run(torch.zeros(2, 64, 5))[:, -FRAMES:]
        share[balance] = (made == 40).float().mean().item()
    assert share[0.0] > 0.5 and share[1.0] < share[0.0] / 2


def test_a_copy_and_a_return_take_the_balance_with_them():
    torch.manual_seed(0)
    model = ConvGRUWorldModel(TINY_WORLD, tiny_tokenizer()).eval()
    tokens = torch.randint(0, 64, (1, 3, 4, 8), generator=torch.Generator().manual_seed(2))
    rollout = Rollout(model, SamplingConfig(code_balance=1.0))
    rollout.prime(tokens, torch.zeros(1, 2, 5))
    rollout.run(torch.zeros(1, 4, 5))
    earlier = rollout.copy()
    ahead = torch.ones(1, 8, 5)
    first = rollout.run(ahead)
    rollout.go_back_to(earlier)
    rollout.generator.set_state(earlier.generator.get_state())
    assert torch.equal(rollout.run(ahead), first)


def test_greedy_play_ignores_the_balance_but_keeps_it_up_to_date():
    torch.manual_seed(0)
    model = ConvGRUWorldModel(TINY_WORLD, tiny_tokenizer()).eval()
    tokens = torch.randint(0, 8, (1, 3, 4, 8), generator=torch.Generator().manual_seed(2))
    made = []
    for balance in (0.0, 1.0):
        rollout = Rollout(model, SamplingConfig(greedy=True, code_balance=balance))
        rollout.prime(tokens, torch.zeros(1, 2, 5))
        made.append(rollout.run(torch.ones(1, 20, 5)))
    assert torch.equal(*made)
    balance = rollout._balance  # of which play goes on when the player switches greedy off
    assert not torch.allclose(balance.generated, balance.recorded, atol=1e-3)
