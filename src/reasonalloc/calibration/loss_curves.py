"""Loss curves: how far predictions move when one key/value head alone is held to a budget, for all heads at once.

Let g gate one head: at 1 its output is that of the full cache, at 0 that of what a scorer has kept of it. To second
order in 1 - g, the divergence of the gated model's predictions from the full cache's is half the Fisher information of
the gate: ``KL(full || gated) = E[(d log p(y) / dg) ** 2] / 2`` at g = 0, with y drawn from the full cache's own
predictions. One pass backwards gives ``d log p(y) / d output`` of every head; its product with the difference of the
two outputs is the derivative, at every budget. So a handful of passes measures all heads at all budgets, where closing
one gate after the other would take ``layers * kv_heads * budgets``. The formula is the textbook's, its use for budgets
is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from reasonalloc.cache.queries import Queries
from reasonalloc.calibration.miss_simulation import MissSimulation
from reasonalloc.engines.models import model_shape
from reasonalloc.policies.allocation.profile import Floats, MissGrid
from reasonalloc.policies.scoring.tokens import LayerTokens
from reasonalloc.policies.scoring.window_attention import at_least_float32

_NAME = "reasonalloc-watched"
_WATCHED = "_reasonalloc_watched"  # set on every attention module while a text is read: where it puts what it saw


@dataclass
class _Layer:
    """What one layer's attention saw of a text, and the slopes of its output, one for each draw."""

    query: Float[Tensor, "1 query_heads tokens dim"]
    key: Float[Tensor, "1 heads tokens dim"]
    value: Float[Tensor, "1 heads tokens dim"]
    scaling: float
    slopes: list[Float[Tensor, "1 tokens query_heads dim"]] = field(default_factory=list)


def _watched_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Causal attention that keeps its inputs and, at each pass backwards, the slope of its output."""
    out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    scaling = kwargs.get("scaling")
    seen = _Layer(query.detach(), key.detach(), value.detach(), query.shape[-1] ** -0.5 if scaling is None else scaling)
    out.register_hook(lambda slope: seen.slopes.append(slope.detach()))
    getattr(module, _WATCHED).append(seen)
    return out, None


AttentionInterface.register(_NAME, _watched_attention)
AttentionMaskInterface.register(_NAME, sdpa_mask)


def loss_curves(
    model: Any,
    ids: Int[Tensor, "tokens"],
    answer: int,
    grids: Mapping[str, MissGrid],
    draws: int = 4,
    seed: int = 0,
    advance: Callable[[], None] | None = None,
) -> dict[str, Float[Floats, "budgets layers kv_heads"]]:
    """Estimated KL(full || one head held to a budget), for every scorer, budget and head.

    Memory: all activations of one pass forwards over the text, and ``draws`` slopes of every layer's attention.

    Args:
        model: any supported decoder; its weights get no gradients.
        ids: prompt and answer.
        answer: how many of the last tokens are predicted. Only there heads are held to their budgets.
        grids: budgets and interval of each scorer, which decides what a head keeps; the prompt is compressed at its
            end, then once in an interval.
        draws: passes backwards, each with a random continuation of its own at every position. The relative standard
            error of one curve is about ``sqrt(2 / (draws * texts))``.
        seed: of the draws.
        advance: called after each of them.

    Returns:
        For each scorer nats, summed over the answer's tokens; not negative.

    Raises:
        ValueError: the model does not run one attention in each layer.
    """
    slopes = loss_slopes(model, ids, answer, grids, draws, seed, advance)
    return {scorer: (found.square().mean(0) / 2).numpy() for scorer, found in slopes.items()}


def loss_slopes(
    model: Any,
    ids: Int[Tensor, "tokens"],
    answer: int,
    grids: Mapping[str, MissGrid],
    draws: int,
    seed: int,
    advance: Callable[[], None] | None = None,
) -> dict[str, Float[Tensor, "draws budgets layers kv_heads"]]:
    """d log p(y) / dg of every draw y, summed over the answer; float64 on the CPU. Arguments as for ``loss_curves``."""
    layers = _read(model, ids, answer, draws, seed, advance)
    return {
        scorer: torch.stack(
            [_gate_slopes(seen, MissSimulation(scorer, grid, i), answer) for i, seen in enumerate(layers)], 2
        )
        for scorer, grid in grids.items()
    }


def _read(
    model: Any, ids: Tensor, answer: int, draws: int, seed: int, advance: Callable[[], None] | None
) -> list[_Layer]:
    """Read the text once forwards and ``draws`` times backwards."""
    layers: list[_Layer] = []
    generator = torch.Generator(device=ids.device).manual_seed(seed)
    before = model.config._attn_implementation
    model.set_attn_implementation(_NAME)
    try:
        with _watching(model, layers), torch.enable_grad():
            logits = model(ids[None], use_cache=False, logits_to_keep=answer + 1).logits[0, :-1]
            chances = at_least_float32(logits.detach()).softmax(-1)
            for draw in range(draws):
                drawn = torch.multinomial(chances, 1, generator=generator)
                # d log p(y) / d logits: one at y, less the chances
                slope = chances.neg().scatter_add_(1, drawn, torch.ones_like(chances[:, :1]))
                logits.backward(slope.to(logits.dtype), retain_graph=draw + 1 < draws)
                if advance is not None:
                    advance()
    finally:
        model.set_attn_implementation(before)
    if len(layers) != model_shape(model.config).layers:
        raise ValueError(
            f"{type(model).__name__} ran {len(layers)} attentions in {model_shape(model.config).layers} layers: "
            "its loss curves cannot be measured; calibrate without them"
        )
    return layers


@contextmanager
def _watching(model: Any, layers: list[_Layer]) -> Iterator[None]:
    """Within, attention layers add what they see to ``layers``, and only activations get gradients."""
    modules = [module for module in model.modules() if hasattr(module, "layer_idx")]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    hook = model.get_input_embeddings().register_forward_hook(lambda _, __, out: out.requires_grad_())
    for module in modules:
        setattr(module, _WATCHED, layers)
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        hook.remove()
        for module in modules:
            delattr(module, _WATCHED)
        for parameter in trained:
            parameter.requires_grad_(True)


@torch.no_grad()
def _gate_slopes(seen: _Layer, simulation: MissSimulation, answer: int) -> Float[Tensor, "draws budgets heads"]:
    """The slopes of one layer's gates."""
    device, interval = seen.key.device, simulation.grid.interval
    _, heads, tokens, _ = seen.key.shape
    observed = max(1, simulation.observed_queries)
    everything = torch.arange(tokens, device=device)
    received = torch.zeros(1, heads, tokens, device=device) if simulation.needs_received else None
    total: Tensor | float = 0.0
    for first in range(tokens - answer, tokens, interval):
        last = min(tokens, first + interval)
        simulation.compress(
            LayerTokens(
                seen.key[:, :, :first],
                seen.value[:, :, :first],
                torch.full((1, heads), first, device=device),
                everything[:first].expand(1, heads, first),
                None if received is None else received[..., :first],
            ),
            Queries(seen.query[:, :, max(0, first - observed) : first]),
            seen.scaling,
        )
        query, *slopes = (
            at_least_float32(x[0, :, first:last]).unflatten(0, (heads, -1))
            for x in (seen.query, *(slope.transpose(1, 2) for slope in seen.slopes))
        )
        key, value = (at_least_float32(x[0, :, :last]) for x in (seen.key, seen.value))
        logits = torch.einsum("hgmd,hnd->hgmn", query, key) * seen.scaling
        weights = logits.masked_fill(everything[:last] > everything[first:last, None], float("-inf")).softmax(-1)
        simulation.observe(weights[None], torch.ones(1, last - first, dtype=torch.bool, device=device), last - first)
        kept = torch.stack(simulation.kept, 1)[0].to(weights.dtype)
        left = torch.einsum("hgmn,bhn->bhgm", weights, kept).clamp(min=torch.finfo(weights.dtype).tiny)
        parts = []
        for slope in slopes:
            gains = weights * torch.einsum("hgmd,hnd->hgmn", slope, value)
            moved = gains.sum(-1) - torch.einsum("hgmn,bhn->bhgm", gains, kept) / left
            parts.append(moved.double().sum((2, 3)))
        total = total + torch.stack(parts)
    return torch.as_tensor(total).cpu()
