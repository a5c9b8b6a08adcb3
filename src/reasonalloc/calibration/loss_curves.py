"""Loss curves: which share of the damage each key/value head does when all are held to a budget.

Every head's output is mixed of what all tokens give and what a scorer has kept of them: ``(1 - a) * full + a * held``.
Along the path from a = 0 (the full cache) to a = 1 (the compressed one) the predictions move away from the full
cache's, by ``KL(full || mixed)``. Its derivative by a is a sum over heads, and one pass backwards gives all of them;
integrated along the path they add up to the whole divergence (integrated gradients, Sundararajan et al. 2017, arXiv
1703.01365, section 3). So a few passes for each budget measure all heads together, each among the others, where
closing one head after the other would take ``layers * kv_heads`` passes and see each alone. The use for budgets is
ours. The tokens that a scorer keeps change along the path, so that with one that looks at queries it has small jumps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from reasonalloc.cache.queries import Queries
from reasonalloc.calibration.miss_simulation import MissSimulation
from reasonalloc.calibration.probe import attention_alone
from reasonalloc.engines.models import model_shape
from reasonalloc.policies.allocation import ModelShape
from reasonalloc.policies.allocation.profile import Floats, MissGrid
from reasonalloc.policies.scoring.tokens import LayerTokens
from reasonalloc.policies.scoring.window_attention import at_least_float32, attention_weights

_NAME = "reasonalloc-mixed"
_PATH = "_reasonalloc_path"  # set on every attention module while a text is read: the point of the path


@dataclass
class _Point:
    """A point of the path, and what was found there.

    Attributes:
        scorer, grid: what heads are held to; the grid has one budget.
        answer: how many of the last tokens are decoded; before them heads see everything.
        share: a, in [0, 1]. At 0 nothing is simulated.
        layers: how many have run.
        shares: of each layer that has dropped anything, what every head adds to the derivative of the divergence.
    """

    scorer: str
    grid: MissGrid
    answer: int
    share: float
    layers: int = 0
    shares: dict[int, Float[Tensor, "kv_heads"]] = field(default_factory=dict)


def _mixed_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Causal attention, mixed with that over what every head has kept."""
    full, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    point: _Point = getattr(module, _PATH)
    layer, point.layers = point.layers, point.layers + 1
    if not point.share:
        return full, None
    scaling = kwargs.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    kept = _kept(query.detach(), key.detach(), value.detach(), scaling, point, layer)
    if kept is None:
        return full, None
    mask = kept.repeat_interleave(query.shape[1] // key.shape[1], 1)
    held, _ = sdpa_attention_forward(module, query, key, value, mask, **kwargs)
    out = full + point.share * (held - full)
    moved = (held - full).detach()

    def add(slope: Tensor) -> None:
        found = (at_least_float32(slope) * at_least_float32(moved)).sum((0, 1, 3)).double()  # query heads
        point.shares[layer] = found.view(key.shape[1], -1).sum(1).cpu()

    out.register_hook(add)
    return out, None


AttentionInterface.register(_NAME, _mixed_attention)
AttentionMaskInterface.register(_NAME, sdpa_mask)


@torch.no_grad()
def _kept(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, point: _Point, layer: int
) -> Bool[Tensor, "1 heads tokens tokens"] | None:
    """What each query sees of the keys when its head is held to the budget, as in a cache that decodes the answer.

    None where nothing is ever dropped.
    """
    device, (_, heads, tokens, _) = key.device, key.shape
    simulation = MissSimulation(point.scorer, point.grid, layer)
    observed = max(1, simulation.observed_queries)
    everything = torch.arange(tokens, device=device)
    prompt = tokens - point.answer

    def held(count: int, received: Tensor | None = None) -> LayerTokens:
        lengths = torch.full((1, heads), count, device=device)
        positions = everything[:count].expand(1, heads, count)
        return LayerTokens(key[:, :, :count], value[:, :, :count], lengths, positions, received)

    def weights(first: int, last: int) -> Float[Tensor, "1 heads group queries tokens"]:
        attention = attention_alone(held(last), Queries(query[:, :, first:last]), scaling)
        return attention_weights(attention, attention.tokens.valid)

    received = None
    if simulation.needs_received:
        received = torch.nn.functional.pad(weights(0, prompt).sum((2, 3)), (0, point.answer))
    seen = (everything <= everything[:, None]).expand(1, heads, tokens, tokens).clone()
    for first in range(prompt, tokens, point.grid.interval):
        last = min(tokens, first + point.grid.interval)
        tokens_there = held(first, None if received is None else received[..., :first])
        simulation.compress(tokens_there, Queries(query[:, :, max(0, first - observed) : first]), scaling)
        if simulation.needs_received:
            every = torch.ones(1, last - first, dtype=torch.bool, device=device)
            simulation.observe(weights(first, last), every, last - first)
        else:
            simulation.follow(last, last - first)
        seen[:, :, first:last, :last] &= simulation.kept[0][:, :, None]
    return None if bool(simulation.kept[0].all()) else seen


def loss_curves(
    model: Any,
    ids: Int[Tensor, "tokens"],
    answer: int,
    grids: Mapping[str, MissGrid],
    points: int = 2,
    advance: Callable[[], None] | None = None,
) -> dict[str, Float[Floats, "budgets layers kv_heads"]]:
    """The share of every head in KL(full || compressed), for every scorer and budget.

    Memory: all activations of a pass forwards over the text, with a mask of query heads x tokens x tokens for every
    layer, and three times the text's predictions (answer x vocabulary).

    Args:
        model: any supported decoder, without gradient checkpointing; its weights get no gradients.
        ids: prompt and answer.
        answer: how many of the last tokens are predicted. Only there heads are held to a budget.
        grids: budgets and interval of each scorer, which decides what a head keeps; the prompt is compressed at its
            end, then once in an interval.
        points: of the path, for each budget a pass forwards and one backwards (Gauss and Legendre's rule). One is
            exact where the divergence grows with the square of a.
        advance: called after each budget.

    Returns:
        For each scorer nats, summed over the answer's tokens; negative where holding a head helps.

    Raises:
        ValueError: the model does not run one attention in each layer.
    """
    shape = model_shape(model.config)
    nodes, weights = np.polynomial.legendre.leggauss(points)
    before = model.config._attn_implementation
    model.set_attn_implementation(_NAME)
    found = {}
    try:
        with torch.inference_mode(False), torch.no_grad():
            uncompressed = _Point("", MissGrid((1,), 1), answer, 0.0)
            with _mixing(model, uncompressed):
                full = at_least_float32(_logits(model, ids, answer)).softmax(-1)
        if uncompressed.layers != shape.layers:
            raise ValueError(
                f"{type(model).__name__} ran {uncompressed.layers} attentions in {shape.layers} layers: its loss "
                "curves cannot be measured; calibrate without them"
            )
        for scorer, grid in grids.items():
            curves = []
            for budget in grid.budgets:
                one = replace(grid, budgets=(budget,))
                parts = [
                    float(weight)
                    / 2
                    * _shares(model, ids, full, _Point(scorer, one, answer, float(node + 1) / 2), shape)
                    for node, weight in zip(nodes, weights, strict=True)
                ]
                curves.append(torch.stack(parts).sum(0))
                if advance is not None:
                    advance()
            found[scorer] = torch.stack(curves).numpy()
    finally:
        model.set_attn_implementation(before)
    return found


def _shares(
    model: Any, ids: Tensor, full: Float[Tensor, "answer vocabulary"], point: _Point, shape: ModelShape
) -> Float[Tensor, "layers kv_heads"]:
    """Each head's part of d KL(full || mixed) / da at a point of the path; float64 on the CPU."""
    with torch.inference_mode(False), torch.enable_grad(), _mixing(model, point):
        logits = _logits(model, ids, point.answer)
        slope = at_least_float32(logits.detach()).softmax(-1).sub_(full)  # of the divergence, by logits
        logits.backward(slope.to(logits.dtype))
    none = torch.zeros(shape.kv_heads, dtype=torch.float64)
    return torch.stack([point.shares.get(layer, none) for layer in range(shape.layers)])


def _logits(model: Any, ids: Tensor, answer: int) -> Float[Tensor, "answer vocabulary"]:
    """Predictions of the answer's tokens."""
    logits: Tensor = model(ids[None], use_cache=False, logits_to_keep=answer + 1).logits
    return logits[0, :-1]


@contextmanager
def _mixing(model: Any, point: _Point) -> Iterator[None]:
    """Within, attention is mixed as at this point, and what the text becomes gets gradients, but weights do not."""
    modules = [module for module in model.modules() if hasattr(module, "layer_idx")]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def mark(module: torch.nn.Module, inputs: Any, out: Tensor) -> Tensor:
        return out.requires_grad_() if torch.is_grad_enabled() else out

    hook = model.get_input_embeddings().register_forward_hook(mark)
    for module in modules:
        setattr(module, _PATH, point)
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        hook.remove()
        for module in modules:
            delattr(module, _PATH)
        for parameter in trained:
            parameter.requires_grad_(True)
