"""Loss sensitivity: how much worse a text is predicted when one key/value head alone forgets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from reasonalloc.engines.models import model_shape
from reasonalloc.policies.scoring.window_attention import at_least_float32

_NAME = "reasonalloc-forgetful"
_FORGETS = "_reasonalloc_forgets"  # set on the attention module of the layer under test: (first head, heads, window)
_MOST_ENTRIES = 1 << 27  # of logits, and of masks, at once: decides how many heads share a forward pass
_LOSS_ROWS = 1024


def _forgetful_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Causal attention; in batch row i the i-th head under test sees only its newest tokens, in the last row none."""
    forgets: tuple[int, int, int] | None = getattr(module, _FORGETS, None)
    if forgets is not None:
        first, heads, window = forgets
        length, group = query.shape[2], query.shape[1] // key.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
        mask = causal.expand(heads + 1, query.shape[1], -1, -1).clone()
        for row in range(heads):
            head = first + row
            mask[row, head * group : (head + 1) * group] &= causal.triu(1 - window)
        attention_mask = mask
    out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return out, None


AttentionInterface.register(_NAME, _forgetful_attention)
AttentionMaskInterface.register(_NAME, sdpa_mask)


@torch.no_grad()
def loss_sensitivity(
    model: Any,
    ids: Int[Tensor, "tokens"],
    answer: int,
    window: int = 16,
    advance: Callable[[], None] | None = None,
) -> Float[Tensor, "layers kv_heads"]:
    """Rise of the negative log-likelihood when one head alone keeps only its newest tokens.

    Layers below the head under test do not change, so their outputs are computed once: about half of
    ``layers * kv_heads`` passes over the text in all.

    Args:
        model: any supported decoder.
        ids: prompt and answer.
        answer: how many of the last tokens are scored.
        window: tokens that the head under test keeps, itself included.
        advance: called after each layer.

    Returns:
        float64 nats, summed over the scored tokens; negative where forgetting helps.
    """
    shape = model_shape(model.config)
    before = model.config._attn_implementation
    model.set_attn_implementation(_NAME)
    try:
        modules = _layers(model, shape.layers)
        with _recorded(modules) as outputs:
            model(ids[None], use_cache=False, logits_to_keep=1)
        rises = torch.zeros(shape.layers, shape.kv_heads, dtype=torch.float64)
        widest = max(answer * model.config.get_text_config().vocab_size, shape.query_heads * len(ids) ** 2)
        together = max(1, min(shape.kv_heads, _MOST_ENTRIES // widest - 1))
        for layer in range(shape.layers):
            with _replayed(modules[:layer], outputs):
                for first in range(0, shape.kv_heads, together):
                    heads = min(together, shape.kv_heads - first)
                    with _forgetting(modules[layer], (first, heads, window)):
                        # The last row forgets nothing: in low precision another batch or kernel is another loss.
                        losses = _nll(model, ids.expand(heads + 1, -1), answer)
                    rises[layer, first : first + heads] = (losses[:-1] - losses[-1:]).sum(1)
            if advance is not None:
                advance()
    finally:
        model.set_attn_implementation(before)
    return rises


def _nll(model: Any, ids: Tensor, answer: int) -> Float[Tensor, "rows answer"]:
    """Negative log-likelihood of the last ``answer`` tokens of each row, float64."""
    logits = model(ids, use_cache=False, logits_to_keep=answer + 1).logits[:, :-1]
    parts = []
    for first in range(0, answer, _LOSS_ROWS):
        part = logits[:, first : first + _LOSS_ROWS]
        targets = ids[:, ids.shape[1] - answer + first :][:, : part.shape[1]]
        losses = torch.nn.functional.cross_entropy(at_least_float32(part).mT, targets, reduction="none")
        parts.append(losses.double().cpu())
    return torch.cat(parts, 1)


def _layers(model: Any, count: int) -> list[torch.nn.Module]:
    """The decoder's layers. Raises ``ValueError`` where the model does not keep them in one list."""
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count and hasattr(module[0], "self_attn"):
            return list(module)
    raise ValueError(f"cannot find the decoder layers of {type(model).__name__}: loss sensitivity needs them in a list")


@contextmanager
def _recorded(modules: list[torch.nn.Module]) -> Iterator[list[Any]]:
    outputs: list[Any] = []
    hooks = [module.register_forward_hook(lambda _, __, out: outputs.append(out)) for module in modules]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _replayed(modules: list[torch.nn.Module], outputs: list[Any]) -> Iterator[None]:
    """Within, the given layers return what they returned before, for every row, without computing it."""

    def replay(output: Any) -> Callable[..., Any]:
        def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            if isinstance(output, tuple):
                return tuple(x.expand(len(hidden), *x.shape[1:]) if isinstance(x, Tensor) else x for x in output)
            return output.expand(len(hidden), *output.shape[1:])

        return forward

    own = [vars(module).get("forward") for module in modules]  # set on the instance by some wrappers
    for module, output in zip(modules, outputs, strict=False):
        vars(module)["forward"] = replay(output)
    try:
        yield
    finally:
        for module, forward in zip(modules, own, strict=True):
            del vars(module)["forward"]
            if forward is not None:
                vars(module)["forward"] = forward


@contextmanager
def _forgetting(layer: torch.nn.Module, forgets: tuple[int, int, int]) -> Iterator[None]:
    attention = layer.self_attn
    setattr(attention, _FORGETS, forgets)
    try:
        yield
    finally:
        delattr(attention, _FORGETS)
