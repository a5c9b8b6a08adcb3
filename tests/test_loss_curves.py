"""Loss curves against the caches that they foretell."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from reference import tiny_model

import reasonalloc as ra
from reasonalloc.calibration.loss_curves import loss_curves
from reasonalloc.evaluation import Trace, teacher_force
from reasonalloc.policies.allocation import MissGrid

TOKENS, ANSWER, INTERVAL = 60, 32, 8
GRID = MissGrid((12, 16, 24), INTERVAL)


@pytest.fixture(scope="module")
def model():
    return tiny_model(dtype=torch.float64)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(2, 97, (TOKENS,), generator=torch.Generator().manual_seed(0))


def divergence(model, ids, compression):
    """KL(full || compressed), summed over the answer, read with real caches."""
    trace = Trace("", ids[:-ANSWER], ids[-ANSWER:])
    full = teacher_force(model, trace, ra.Compression.method("full"), keep_log_probs=True)
    return float(teacher_force(model, trace, compression, full).kl.astype(float).sum())


def test_the_heads_add_up_to_the_divergence_of_a_real_cache(model, ids):
    """StreamingLLM keeps the same tokens whatever they say, so that the path has no jumps."""
    curves = loss_curves(model, ids, ANSWER, {"streaming": GRID}, points=12)["streaming"]
    for curve, budget in zip(curves, GRID.budgets, strict=True):
        expected = divergence(model, ids, ra.Compression.method("streaming", budget, interval=INTERVAL))
        assert curve.sum() == pytest.approx(expected, rel=0.01)
        assert expected > 1


def test_a_protected_prompt(model, ids):
    grid = MissGrid((12,), INTERVAL, protect_prompt=True)
    curves = loss_curves(model, ids, ANSWER, {"streaming": grid}, points=12)["streaming"]
    compression = ra.Compression.method("streaming", 12, interval=INTERVAL, prompt="protect")
    expected = divergence(model, ids, compression)
    assert curves[0].sum() == pytest.approx(expected, rel=0.01)
    assert expected != pytest.approx(divergence(model, ids, compression.replace(prompt="compete")), rel=0.1)


@pytest.mark.parametrize("scorer", ["rkv", "h2o", "snapkv"])
def test_scorers_follow_what_has_been_forgotten(model, ids, scorer):
    """Kept tokens change along the path: it jumps, and the sum is near, not equal."""
    curves = loss_curves(model, ids, ANSWER, {scorer: GRID}, points=12)[scorer]
    for curve, budget in zip(curves, GRID.budgets, strict=True):
        compression = ra.Compression(budget, scorer, layers="uniform", heads="uniform", interval=INTERVAL)
        assert curve.sum() == pytest.approx(divergence(model, ids, compression), rel=0.35)


def test_a_model_is_left_as_it_was(model, ids):
    with torch.no_grad():
        before = model(ids[None], use_cache=False).logits
    trained = [parameter.requires_grad for parameter in model.parameters()]
    loss_curves(model, ids, ANSWER, {"h2o": GRID, "rkv": GRID}, points=1)
    assert model.config._attn_implementation == "reasonalloc"
    assert [parameter.requires_grad for parameter in model.parameters()] == trained
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any("reasonalloc" in name for module in model.modules() for name in vars(module))
    with torch.no_grad():
        assert torch.equal(model(ids[None], use_cache=False).logits, before)


def test_a_budget_that_holds_everything_loses_nothing(model, ids):
    curves = loss_curves(model, ids, ANSWER, {"rkv": MissGrid((12, TOKENS), INTERVAL)})["rkv"]
    assert curves[0].sum() > 1
    assert np.abs(curves[1]).max() < 1e-12
