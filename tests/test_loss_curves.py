"""Loss curves against gates that are turned by hand, one after the other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from reference import tiny_model
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from reasonalloc.calibration.loss_curves import loss_curves, loss_slopes
from reasonalloc.policies.allocation import MissGrid

TOKENS, ANSWER, INTERVAL = 60, 32, 8
GRID = MissGrid((12, 16, 24), INTERVAL)
SINKS = 4
_GATE = {}  # layer, head, budget, and how far the gate is open


def gated_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Attention in float64; the head under test mixes what all tokens give with what StreamingLLM has kept of them."""
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    seen = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    logits = query @ key.mT * scaling
    out = logits.masked_fill(~seen, float("-inf")).softmax(-1) @ value
    if module.layer_idx == _GATE["layer"]:
        heads = slice(_GATE["head"] * group, (_GATE["head"] + 1) * group)
        shut = logits.masked_fill(~(seen & kept_by_streaming(_GATE["budget"])), float("-inf")).softmax(-1) @ value
        out[:, heads] = _GATE["open"] * out[:, heads] + (1 - _GATE["open"]) * shut[:, heads]
    return out.transpose(1, 2), None


AttentionInterface.register("gated-by-hand", gated_attention)
AttentionMaskInterface.register("gated-by-hand", sdpa_mask)


def kept_by_streaming(budget):
    """[queries, tokens]: at each compression the first four and the newest stay; what comes later is seen."""
    kept = torch.ones(TOKENS, TOKENS, dtype=torch.bool)
    for query in range(TOKENS - ANSWER, TOKENS):
        compressed = query - (query - (TOKENS - ANSWER)) % INTERVAL  # so many tokens were there
        kept[query, SINKS : compressed - (budget - SINKS)] = False
    return kept


def log_probabilities(model, ids, **gate):
    _GATE.update({"layer": None, **gate})
    before = model.config._attn_implementation
    model.set_attn_implementation("gated-by-hand")
    with torch.no_grad():
        logits = model(ids[None], use_cache=False).logits[0, -ANSWER - 1 : -1]
    model.set_attn_implementation(before)
    return logits.log_softmax(-1)


@pytest.fixture(scope="module")
def model():
    return tiny_model(dtype=torch.float64)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(2, 97, (TOKENS,), generator=torch.Generator().manual_seed(0))


def test_slopes_equal_a_gate_turned_by_hand(model, ids):
    found = loss_slopes(model, ids, ANSWER, {"streaming": GRID}, draws=2, seed=5)["streaming"]
    chances = log_probabilities(model, ids).exp()
    generator = torch.Generator().manual_seed(5)
    step = 0.02  # the model's norms are taken in float32
    for draw in range(2):
        drawn = torch.multinomial(chances, 1, generator=generator)
        for i, budget in enumerate(GRID.budgets):
            for layer in range(3):
                for head in range(3):
                    gate = {"layer": layer, "head": head, "budget": budget}
                    above, below = (
                        log_probabilities(model, ids, **gate, open=1 + side * step).gather(1, drawn).sum()
                        for side in (1, -1)
                    )
                    assert float(found[draw, i, layer, head]) == pytest.approx(
                        float(above - below) / (2 * step), rel=0.01, abs=0.02
                    )
    assert found.abs().mean() > 0.2


def test_curves_estimate_the_divergence(model, ids):
    """With many draws, and a gate that is hardly turned, so that higher orders do not count."""
    curves = loss_curves(model, ids, ANSWER, {"streaming": GRID}, draws=600)["streaming"]
    full, turned = log_probabilities(model, ids), 0.01
    for layer, head, i in ((0, 1, 0), (1, 2, 1), (2, 0, 0)):
        gate = {"layer": layer, "head": head, "budget": GRID.budgets[i]}
        gated = log_probabilities(model, ids, **gate, open=1 - turned)
        kl = float((full.exp() * (full - gated)).sum()) / turned**2
        assert curves[i, layer, head] == pytest.approx(kl, rel=4 * np.sqrt(2 / 600) + 0.05)


def test_a_model_is_left_as_it_was(model, ids):
    before = log_probabilities(model, ids)
    trained = [parameter.requires_grad for parameter in model.parameters()]
    curves = loss_curves(model, ids, ANSWER, {"h2o": GRID}, draws=1)["h2o"]
    assert curves.shape == (3, 3, 3)
    assert (curves >= 0).all()
    assert model.config._attn_implementation == "reasonalloc"
    assert [parameter.requires_grad for parameter in model.parameters()] == trained
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any("watched" in name for module in model.modules() for name in vars(module))
    assert torch.equal(log_probabilities(model, ids), before)


def test_a_budget_that_holds_everything_loses_nothing(model, ids):
    curves = loss_curves(model, ids, ANSWER, {"rkv": MissGrid((10, TOKENS), INTERVAL)}, draws=2)["rkv"]
    assert curves[0].min() > 1e-3
    assert curves[1].max() < 1e-20
