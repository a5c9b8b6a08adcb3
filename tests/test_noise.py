"""Counter-based random numbers: what they depend on, and that they look random."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from reasonalloc.policies.scoring.noise import Noise, stream_of

LEAST = 1e-4  # of p values: the seeds are fixed, so what passes once passes always


def noise(seed=7, rows=3, stream=None, seen=None):
    stream = torch.arange(rows) if stream is None else torch.as_tensor(stream)
    return Noise(seed, stream, torch.full((len(stream),), 100) if seen is None else torch.as_tensor(seen))


def positions(rows, heads, tokens):
    return torch.arange(tokens, dtype=torch.int32).expand(rows, heads, tokens)


# ---- what the numbers depend on ----


def splitmix(x):
    """The output function of splitmix64, in Python's unbounded integers."""
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
    return x ^ (x >> 31)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63, 2**70 + 3])
def test_against_unbounded_integers(seed):
    made = noise(seed, stream=[0, 5, 2_000_006], seen=[0, 31, 1 << 20])
    got = made.uniform(torch.tensor([3, 0, 1 << 19]).expand(3, 2, 3))
    for row, head, token in itertools.product(range(3), range(2), range(3)):
        state = 0
        for number in (seed, (0, 5, 2_000_006)[row], (0, 31, 1 << 20)[row], head, (3, 0, 1 << 19)[token]):
            state = splitmix(state ^ (number % 2**64))
        assert float(got[row, head, token]) == ((state >> 41) + 0.5) / 2**23
    normal = made.normal(3, 4)
    state = 0
    for number in (seed, 5, 31, -1, 6):
        state = splitmix(state ^ (number % 2**64))
    assert float(normal[1, 1, 2]) == pytest.approx(stats.norm.ppf(((state >> 41) + 0.5) / 2**23), rel=1e-4)


def test_the_first_answer_of_splitmix64():
    """Of the published generator, seeded with 0."""
    assert splitmix(0) == 0xE220A8397B1DCDAF


def test_draws_are_float32_inside_the_interval():
    got = noise(rows=8).uniform(positions(8, 8, 1 << 15))
    assert got.dtype == torch.float32
    assert 0 < got.min() < 2e-6
    assert 1 - 2e-6 < got.max() < 1
    assert noise().normal(5, 4).dtype == torch.float32
    assert noise().normal(5, 4).shape == (3, 5, 4)
    assert noise(rows=1 << 10).normal(32, 32).isfinite().all()


def test_padding_batch_and_order_do_not_matter():
    made, at = noise(stream=[4, 9, 2], seen=[30, 10, 20]), positions(3, 2, 40)
    together = made.uniform(at)
    assert torch.equal(made.uniform(at[..., :25]), together[..., :25])
    assert torch.equal(made.uniform(at[:, :1].long()), together[:, :1])
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(made.uniform(at[..., order]), together[..., order])
    turned = noise(stream=[2, 4], seen=[20, 30])
    assert torch.equal(turned.uniform(at[:2]), together[[2, 0]])
    assert torch.equal(turned.normal(3, 4), made.normal(3, 4)[[2, 0]])
    assert torch.equal(made.uniform(at), together), "there is a state"


def test_everything_counts():
    """Seed, stream, round, head and position: none of the draws of one is another's."""
    at = positions(2, 2, 50)
    every = [
        noise(seed, 2, [stream, stream + 1], [seen] * 2)
        for seed, stream, seen in itertools.product((1, 2), (0, 2), (0, 1))
    ]
    assert len(torch.stack([made.uniform(at) for made in every]).unique()) == len(every) * at.numel()
    assert len(torch.stack([made.normal(5, 5) for made in every]).unique()) == len(every) * 50


def test_streams_of_layers_are_apart():
    rows = torch.arange(1000)
    streams = torch.cat([stream_of(layer, rows) for layer in range(50)])
    assert len(streams.unique()) == len(streams)
    assert torch.equal(stream_of(torch.tensor([3, 4]), torch.tensor([0, 1])), torch.tensor([3_000_009, 4_000_013]))


def test_one_number_for_each_row():
    with pytest.raises(ValueError, match=r"one number for each row, got shapes \(3,\) and \(2,\)"):
        Noise(0, torch.arange(3), torch.arange(2))


# ---- whether they look random ----


def correlation(a, b):
    """The correlation in its own standard deviations, of as many draws."""
    a, b = a.double().flatten(), b.double().flatten()
    return abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) * math.sqrt(len(a))


def test_draws_are_uniform():
    got = noise(rows=4).uniform(positions(4, 4, 20_000))
    count = got.numel()
    assert abs(float(got.double().mean()) - 0.5) < 4 * math.sqrt(1 / 12 / count)
    assert abs(float(got.double().var()) - 1 / 12) < 4 * math.sqrt(1 / 180 / count)
    assert stats.kstest(got.flatten().numpy(), "uniform").pvalue > LEAST
    for row, head in itertools.product(range(4), range(4)):
        assert stats.kstest(got[row, head].numpy(), "uniform").pvalue > LEAST
    # Along every other axis too: one position in many streams, many rounds, many seeds.
    one = positions(1, 1, 1)
    many = one.expand(20_000, 1, 1)
    streams = noise(rows=20_000).uniform(many).flatten()
    later = noise(stream=[5] * 20_000, seen=torch.arange(20_000) * 128).uniform(many).flatten()
    seeds = torch.tensor([float(noise(seed, 1).uniform(one)) for seed in range(5000)])
    for draws in (streams, later, seeds):
        assert stats.kstest(draws.numpy(), "uniform").pvalue > LEAST


def test_neighbours_are_independent():
    made, at = noise(rows=4), positions(4, 4, 20_000)
    got = made.uniform(at)
    other = noise(rows=4, stream=[4, 5, 6, 7]).uniform(at)
    layer = noise(stream=stream_of(1, torch.arange(4))).uniform(at)
    seed, later = noise(8, 4).uniform(at), noise(rows=4, seen=[101] * 4).uniform(at)
    for lag in (1, 2, 8, 64):
        assert correlation(got[..., :-lag], got[..., lag:]) < 4, f"positions {lag} apart"
    assert correlation(got[:, :-1], got[:, 1:]) < 4, "heads"
    assert correlation(got[:-1], got[1:]) < 4, "rows"
    for name, x in (("streams", other), ("layers", layer), ("seeds", seed), ("rounds", later)):
        assert correlation(got, x) < 4, name
    # Which of two neighbours is larger, too: an order of ranks is what evictions are made of.
    up = (got[..., :-1:2] < got[..., 1::2]).double()
    assert abs(float(up.mean()) - 0.5) < 4 * 0.5 / math.sqrt(up.numel())
    pairs = np.histogram2d(got[..., :-1:2].flatten(), got[..., 1::2].flatten(), bins=16, range=[[0, 1], [0, 1]])[0]
    assert stats.chisquare(pairs.flatten()).pvalue > LEAST


def test_matrices_are_normal_and_independent():
    made = noise(rows=2000)
    got = made.normal(16, 4)
    assert stats.kstest(got.flatten().numpy(), "norm").pvalue > LEAST
    assert abs(float(got.double().var()) - 1) < 4 * math.sqrt(2 / got.numel())
    assert abs(float(got.double().pow(4).mean()) - 3) < 4 * math.sqrt(96 / got.numel())
    assert correlation(got[:, :-1], got[:, 1:]) < 4
    assert correlation(got[..., :-1], got[..., 1:]) < 4
    assert correlation(got[:-1], got[1:]) < 4
    # Nor is it what the same round draws for its tokens.
    assert correlation(got.flatten(1)[:, :20], made.uniform(positions(2000, 1, 20))[:, 0]) < 4
