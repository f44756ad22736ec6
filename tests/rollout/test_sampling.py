"""Sampling tokens, and rollouts."""

import math
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY_WORLD, tiny_tokenizer

from model_convGru import ConvGRUWorldModel
from rollout import sampling as sampling_module
from rollout.rollout import Rollout
from rollout.sampling import (
    CARRIED_NOISE,
    SHARED_NOISE,
    SMOOTHING_CELLS,
    SamplingConfig,
    carry_noise,
    correlated_noise,
    sample_from_logits,
    sample_tokens,
)
from runtime.config import SettingError
from runtime.video import to_float, to_uint8


def random_logits(batch: int = 2, codes: int = 12, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(batch, codes, 6, 7, generator=torch.Generator().manual_seed(seed))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_greedy_takes_the_most_likely_code():
    logits = random_logits()
    assert torch.equal(sample_from_logits(logits, SamplingConfig(greedy=True)), logits.argmax(1))


@pytest.mark.parametrize("k", [1, 3, 11, 12, 50])
def test_top_k_never_leaves_the_top_k(k):
    logits = random_logits()
    allowed = logits.topk(min(k, 12), dim=1).indices
    found = set()
    for seed in range(200):
        tokens = sample_from_logits(logits, SamplingConfig(temperature=3.0, top_k=k), generator(seed))
        assert (allowed == tokens[:, None]).any(1).all()
        found.add(tokens[0, 0, 0].item())
    assert len(found) >= min(k, 3), "and it does not settle for one"


def test_top_1_is_greedy():
    logits = random_logits()
    assert torch.equal(sample_from_logits(logits, SamplingConfig(top_k=1), generator()), logits.argmax(1))


def test_low_temperature_approaches_greedy():
    logits = random_logits()
    agreement = [
        (sample_from_logits(logits, SamplingConfig(temperature=t), generator()) == logits.argmax(1))
        .float()
        .mean()
        .item()
        for t in (10.0, 1.0, 0.01)
    ]
    assert agreement[0] < agreement[1] < agreement[2]
    assert agreement[2] > 0.98


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingConfig(),
        SamplingConfig(temperature=0.5),
        SamplingConfig(temperature=2.0),
        SamplingConfig(temperature=1.3, top_k=4),
    ],
)
def test_frequencies_are_the_softmax_probabilities(sampling):
    """Pearson's chi-square against the distribution that temperature and top-k define."""
    logits = torch.tensor([2.0, -1.0, 0.5, 0.0, 1.5, -3.0, 1.0])
    draws = 20_000
    tokens = sample_from_logits(logits.view(1, 7, 1, 1).expand(1, 7, draws, 1), sampling, generator(3))
    counts = torch.bincount(tokens.flatten(), minlength=7).double()
    scaled = logits.double() / sampling.temperature
    if sampling.top_k:
        scaled[scaled < scaled.topk(sampling.top_k).values[-1]] = -torch.inf
    expected = scaled.softmax(0) * draws
    possible = expected > 0
    assert counts[~possible].sum() == 0
    chi_square = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    assert chi_square < 22.5, "0.1 % point of chi-square with 6 degrees of freedom"


def test_certain_code_is_always_sampled():
    """Also where the cumulative sum of 1,024 probabilities rounds to a little below 1."""
    for code in (0, 511, 1023):
        logits = torch.full((1, 1024, 30, 30), -40.0)
        logits[:, code] = 40.0
        assert (sample_from_logits(logits, SamplingConfig(), generator()) == code).all()


def test_same_generator_gives_the_same_tokens():
    logits = random_logits()
    first, again, other = (
        sample_from_logits(logits, SamplingConfig(), generator(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    sample_from_logits(logits, SamplingConfig(), generator(1))
    assert torch.equal(torch.get_rng_state(), before), "the global generator is left alone"


def test_cells_are_sampled_independently():
    tokens = sample_from_logits(torch.zeros(1, 2, 100, 100), SamplingConfig(), generator())
    left, right = tokens[..., :-1].float() - 0.5, tokens[..., 1:].float() - 0.5
    assert abs((left * right).mean().item() / 0.25) < 0.05


def test_top_p_keeps_the_most_likely_codes_that_reach_it():
    shares = torch.tensor([0.05, 0.5, 0.25, 0.2])
    logits = shares.log()[None, :, None, None].expand(1, 4, 40, 40)
    for top_p, kept in ((0.4, {1}), (0.6, {1, 2}), (0.9, {1, 2, 3}), (1.0, {0, 1, 2, 3})):
        tokens = sample_from_logits(logits, SamplingConfig(top_p=top_p), generator())
        assert set(tokens.unique().tolist()) == kept
        share = (tokens == 1).float().mean().item()
        assert share == pytest.approx(0.5 / shares[list(kept)].sum().item(), abs=0.05)


def test_visible_cells_take_the_most_likely_code_and_the_others_are_sampled():
    logits = torch.randn(1, 8, 30, 30)
    visible = torch.zeros(1, 30, 30)
    visible[..., :15] = 1
    tokens = sample_from_logits(logits, SamplingConfig(), generator(), visible_mask=visible)
    assert torch.equal(tokens[..., :15], logits.argmax(1)[..., :15])
    assert (tokens[..., 15:] == logits.argmax(1)[..., 15:]).float().mean() < 0.6
    warm = sample_from_logits(
        logits, SamplingConfig(visible_temperature=1.0), generator(), visible_mask=visible
    )
    assert (warm[..., :15] == logits.argmax(1)[..., :15]).float().mean() < 0.6


def test_same_noise_gives_the_same_tokens():
    logits, noise = torch.randn(2, 8, 5, 5), torch.rand(2, 5, 5)
    first = sample_from_logits(logits, SamplingConfig(), noise=noise)
    assert torch.equal(first, sample_from_logits(logits, SamplingConfig(), generator(), noise=noise))
    assert not torch.equal(first, sample_from_logits(logits, SamplingConfig(), noise=1 - noise))


def test_a_shift_acts_where_cells_are_sampled():
    logits = torch.zeros(1, 5, 2, 2)
    logits[:, 1] = 1.0
    shift = torch.zeros(1, 2, 2, 5)
    shift[..., 3] = 100.0
    noise, visible_mask = torch.full((1, 2, 2), 0.5), torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])

    def tokens(mask, **sampling):
        return sample_from_logits(
            logits, SamplingConfig(**sampling), noise=noise, visible_mask=mask, shift=shift
        )

    assert tokens(visible_mask).tolist() == [[[1, 3], [3, 1]]]
    assert tokens(None).tolist() == [[[3, 3], [3, 3]]]
    assert tokens(visible_mask, greedy=True).tolist() == [[[1, 1], [1, 1]]]


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": 0.0},
        {"temperature": -1.0},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"passes": 0},
        {"code_balance": -0.1},
    ],
)
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(SettingError, match=next(iter(wrong))):
        SamplingConfig(**wrong)


@pytest.fixture
def model() -> ConvGRUWorldModel:
    torch.manual_seed(0)
    return ConvGRUWorldModel(TINY_WORLD, tiny_tokenizer()).eval()


@pytest.fixture
def recording() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [2, 6, 4, 8] and the 5 actions between them."""
    return torch.randint(0, 64, (2, 6, 4, 8), generator=generator()), torch.rand(
        2, 5, 5, generator=generator(1)
    )


def test_rollout_is_the_model_stepped_by_hand(model, recording):
    tokens, actions = recording
    rollout = Rollout(model, SamplingConfig(greedy=True))
    rollout.prime(tokens[:, :3], actions[:, :2])
    made = rollout.run(actions[:, 2:])
    with torch.no_grad():
        state = None
        for t in range(2):
            _, state = model.step(tokens[:, t], actions[:, t], state)
        now = tokens[:, 2]
        for t in range(3):
            logits, state = model.step(now, actions[:, 2 + t], state)
            now = logits.argmax(1)
            assert torch.equal(made[:, t], now)
    torch.testing.assert_close(rollout.state, state, rtol=0, atol=1e-6)
    assert torch.equal(rollout.tokens, made[:, -1])


@pytest.mark.parametrize("context", [1, 2, 6])
def test_any_context_primes(model, recording, context):
    tokens, actions = recording
    rollout = Rollout(model)
    rollout.prime(tokens[:, :context], actions[:, : context - 1])
    assert torch.equal(rollout.tokens, tokens[:, context - 1])
    assert rollout.step(actions[:, 0]).shape == (2, 4, 8)


def test_the_context_matters_beyond_its_last_frame(model, recording):
    tokens, actions = recording
    long, short = Rollout(model), Rollout(model)
    long.prime(tokens, actions)
    short.prime(tokens[:, -1:], actions[:, :0])
    assert torch.equal(long.tokens, short.tokens)
    assert not torch.allclose(long.state, short.state)


def test_prime_starts_again(model, recording):
    tokens, actions = recording
    rollout = Rollout(model, seed=3)
    rollouts = []
    for _ in range(2):
        rollout.prime(tokens, actions)
        rollouts.append(rollout.run(actions))
    assert torch.equal(*rollouts)
    other = Rollout(model, seed=4)
    other.prime(tokens, actions)
    assert not torch.equal(other.run(actions), rollouts[0])


def test_copy_continues_as_the_original_would(model, recording):
    tokens, actions = recording
    rollout = Rollout(model, SamplingConfig(temperature=2.0), seed=4)
    rollout.prime(tokens, actions)
    ahead = torch.ones(len(tokens), 4, 5)
    copies = [rollout.copy(), rollout.copy()]
    first = copies[0].run(-ahead)
    assert torch.equal(rollout.run(ahead), copies[1].run(ahead))
    rollout.prime(tokens, actions)
    assert torch.equal(first, rollout.run(-ahead))


def test_step_before_prime_is_refused(model, recording):
    with pytest.raises(RuntimeError, match="prime"):
        Rollout(model).step(recording[1][:, 0])


def test_prime_wants_one_action_less_than_frames(model, recording):
    with pytest.raises(ValueError, match="6 frames need 5 actions, got 4"):
        Rollout(model).prime(recording[0], recording[1][:, :4])


def test_pictures_are_the_decoded_tokens(model, recording):
    tokenizer = tiny_tokenizer()
    rollout = Rollout(model)
    rollout.prime(recording[0][:, :1], recording[1][:, :0])
    pictures = rollout.pictures()
    assert pictures.shape == (2, 16, 32, 3) and pictures.dtype == torch.uint8
    with torch.no_grad():
        decoded = tokenizer.decode(recording[0][:, 0])
    assert (pictures.float() / 255 - decoded.permute(0, 2, 3, 1)).abs().max() < 0.5 / 255 + 1e-6


# ---------------------------------------------------------------- pictures


def test_pictures_survive_the_way_to_floats_and_back():
    pictures = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 16, 16, 3)
    floats = to_float(pictures)
    assert floats.shape == (1, 3, 16, 16) and floats.min() == 0 and floats.max() == 1
    assert torch.equal(to_uint8(floats), pictures)


def test_colours_out_of_range_are_clipped_not_wrapped():
    assert to_uint8(torch.tensor([-0.5, 1.5, 0.5]).view(1, 3, 1, 1)).flatten().tolist() == [0, 255, 128]


class Cells(torch.nn.Module):
    """A world model for one prediction, whose logits do not depend on it; notes the numbers of cells."""

    def __init__(self, worlds: int):
        super().__init__()
        self.all = 3 * torch.randn(worlds, 12, 18, 32, generator=generator(4))
        self.sizes = set()

    def condition_on_tokens(self, prediction, tokens, given):
        return prediction

    def logits(self, prediction, cells=None, trust=None):
        if cells is None:
            return self.all
        self.sizes.add(cells.shape[1])
        return self.all.flatten(2).mT.gather(1, cells[..., None].expand(-1, -1, 12))


def test_the_numbers_of_cells_sampled_again_are_few(monkeypatch):
    """Libraries keep a kernel for each; the tokens are those of the exact numbers."""
    model, found = Cells(3), {}
    for step in (64, 1):
        monkeypatch.setattr(sampling_module, "CELLS_STEP", step)
        model.sizes.clear()
        for n in range(40):
            noise, shown = torch.rand(2, 3, 18, 32, generator=generator(n))
            visible, every_pass = (shown < n / 39).float(), torch.tensor([True, False, True])
            prediction = SimpleNamespace(
                visible_mask=visible,
                keyframe_due=every_pass,
                refined=torch.zeros_like(visible, dtype=torch.bool),
            )
            tokens = sample_tokens(model, prediction, SamplingConfig(passes=2 + n % 2), noise)
            assert torch.equal(found.setdefault(n, tokens), tokens)
        assert (max(model.sizes) <= 576) and (len(model.sizes) <= 9) == (step == 64)


class Pair:
    """Two cells that are always equal: code 0 with probability 0.7, else code 1."""

    def condition_on_tokens(self, prediction, tokens, given):
        seen = (tokens * given).sum((1, 2)) / given.sum((1, 2)).clamp(min=1)
        chance = torch.where(given.any(2).any(1), 1 - seen, 0.7).clamp(1e-9, 1 - 1e-9)
        return SimpleNamespace(chance=chance)

    def logits(self, prediction, cells=None, trust=None):
        both = torch.stack([prediction.chance, 1 - prediction.chance], 1).log()
        return (
            both[:, :, None, None].expand(-1, -1, 1, 2) if cells is None else both[:, None].expand(-1, 2, -1)
        )


def test_passes_sample_the_joint_distribution_in_random_order():
    worlds = 20_000
    noise = torch.rand(worlds, 1, 2, generator=generator(0))
    prediction = SimpleNamespace(
        chance=torch.full((worlds,), 0.7),
        visible_mask=torch.zeros(worlds, 1, 2),
        refined=torch.zeros(worlds, 1, 2, dtype=torch.bool),
        keyframe_due=torch.ones(worlds, dtype=torch.bool),
    )
    one = sample_tokens(Pair(), prediction, SamplingConfig(), noise)[:, 0]
    assert (one[:, 0] == one[:, 1]).float().mean().item() == pytest.approx(0.58, abs=0.02), "each by itself"
    two = sample_tokens(Pair(), prediction, SamplingConfig(passes=2), noise)[:, 0]
    assert (two[:, 0] == two[:, 1]).all()
    # The most confident first would make it 0.91.
    assert (two == 0).float().mean().item() == pytest.approx(0.7, abs=0.02)
    assert (two[:, 0] == one[:, 0]).float().mean().item() == pytest.approx(0.79, abs=0.02), (
        "either may be first"
    )


# ---------------------------------------------------------------- correlated noise


def test_noise_of_a_cell_is_standard_normal_also_at_the_border():
    noise = torch.special.ndtr(correlated_noise((4000, 4, 5), generator(0)))
    for place in (noise[:, 0, 0], noise[:, 2, 2], noise[:, 3, 4]):
        shares = torch.histc(place, 10, 0, 1) / len(place)
        assert (shares - 0.1).abs().max() < 0.025


def test_neighbours_have_similar_noise_and_distant_cells_have_not():
    noise = correlated_noise((400, 18, 32), generator(1))

    def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
        return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()

    # Smoothed by a Gaussian of s cells, cells d apart have a correlation of exp(-d^2 / 4 s^2).
    expected = SHARED_NOISE * math.exp(-1 / (4 * SMOOTHING_CELLS**2))
    assert correlation(noise[:, :, 1:], noise[:, :, :-1]) == pytest.approx(expected, abs=0.02)
    assert correlation(noise[:, 1:], noise[:, :-1]) == pytest.approx(expected, abs=0.02)
    assert abs(correlation(noise[:, :, 12:], noise[:, :, :-12])) < 0.03
    assert abs(correlation(noise[1:], noise[:-1])) < 0.03, "worlds are independent"


def test_samples_keep_their_distribution_and_come_in_patches():
    logits = torch.tensor([0.5, 0.3, 0.2]).log()[None, :, None, None].expand(300, 3, 18, 32)
    noise = torch.special.ndtr(correlated_noise((300, 18, 32), generator(2)))
    tokens = sample_from_logits(logits, SamplingConfig(), noise=noise)
    shares = tokens.flatten().bincount(minlength=3) / tokens.numel()
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.3, 0.2]), rtol=0, atol=0.02)
    same = (tokens[:, :, 1:] == tokens[:, :, :-1]).float().mean().item()
    assert same > 0.38 + 0.15, "independent samples agree in 0.38 of the cells"


def test_noise_moves_with_the_view_and_stays_standard_normal():
    last, fresh = (torch.randn(200, 6, 8, generator=generator(seed)) for seed in (3, 4))
    rows, columns = torch.meshgrid(torch.arange(6), torch.arange(8), indexing="ij")
    # Each cell lies three columns to the right in the last frame, the last three columns outside of it.
    grid = torch.stack([(2 * (columns + 3) + 1) / 8 - 1, (2 * rows + 1) / 6 - 1], -1).expand(200, -1, -1, -1)
    visible = torch.ones(200, 6, 8)
    visible[:, 0] = 0.0  # disoccluded
    noise = carry_noise(last, fresh, grid, visible)
    assert torch.equal(noise[:, 0], fresh[:, 0]) and torch.equal(noise[:, :, 5:], fresh[:, :, 5:])
    expected = CARRIED_NOISE**0.5 * last[:, 1:, 3:] + (1 - CARRIED_NOISE) ** 0.5 * fresh[:, 1:, :5]
    torch.testing.assert_close(noise[:, 1:, :5], expected)
    assert noise[:, 1:, :5].std().item() == pytest.approx(1, abs=0.03)
