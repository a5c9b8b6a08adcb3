"""Loss curves against the caches that they foretell."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from reference import tiny_model
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

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
        assert curve.sum() == pytest.approx(divergence(model, ids, compression), rel=0.06)


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
    with torch.inference_mode():
        curves = loss_curves(model, ids, ANSWER, {"rkv": MissGrid((12, TOKENS), INTERVAL)})["rkv"]
    assert curves[0].sum() > 1
    assert not curves[1].any()


# ---- every head for itself ----

_GATES: dict[str, object] = {}  # the budget, how far all heads are held ("share"), and one that is held otherwise


def gated_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Each head mixes what all tokens give with what StreamingLLM has kept of them, written out."""
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    causal = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    logits = query @ key.mT * scaling
    full, held = (
        logits.masked_fill(~seen, float("-inf")).softmax(-1) @ value
        for seen in (causal, causal & kept_by_streaming(_GATES["budget"]))
    )
    share = torch.full((query.shape[1] // group,), _GATES["share"], dtype=query.dtype)
    layer, head, other = _GATES["one"]
    if module.layer_idx == layer:
        share[head] = other
    share = share.repeat_interleave(group)[:, None, None]
    return ((1 - share) * full + share * held).transpose(1, 2), None


AttentionInterface.register("gated-by-hand", gated_attention)
AttentionMaskInterface.register("gated-by-hand", sdpa_mask)


def kept_by_streaming(budget, sinks=4):
    """[queries, tokens]: at each compression the first four and the newest stay; what comes later is seen."""
    kept = torch.ones(TOKENS, TOKENS, dtype=torch.bool)
    for query in range(TOKENS - ANSWER, TOKENS):
        compressed = query - (query - (TOKENS - ANSWER)) % INTERVAL  # so many tokens were there
        kept[query, sinks : compressed - (budget - sinks)] = False
    return kept


def test_each_head_has_its_own_share(model, ids):
    """The share of a head is the slope of the divergence by that head's own mixture, at the points of the path."""
    budget, step, points = 16, 1e-3, 2
    found = loss_curves(model, ids, ANSWER, {"streaming": MissGrid((budget,), INTERVAL)}, points)["streaming"][0]

    def log_probabilities(share, one=(-1, 0, 0.0)):
        _GATES.update(budget=budget, share=share, one=one)
        with torch.no_grad():
            return model(ids[None], use_cache=False).logits[0, -ANSWER - 1 : -1].log_softmax(-1)

    model.set_attn_implementation("gated-by-hand")
    try:
        full = log_probabilities(0.0)
        expected = np.zeros((3, 3))
        for node, weight in zip(*np.polynomial.legendre.leggauss(points), strict=True):
            share = (node + 1) / 2
            for layer in range(3):
                for head in range(3):
                    above, below = (
                        (full.exp() * (full - log_probabilities(share, (layer, head, share + side * step)))).sum()
                        for side in (1, -1)
                    )
                    expected[layer, head] += weight / 2 * float(above - below) / (2 * step)
    finally:
        model.set_attn_implementation("reasonalloc")
    assert found == pytest.approx(expected, abs=2e-3)
    assert np.ptp(expected) > 0.5
