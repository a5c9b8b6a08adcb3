"""The attention and mask functions that transformers calls when ``attn_implementation="reasonalloc"``.

The cache's ``update`` returns the new keys tagged with the layer that they belong to; the attention function sees
the tag and hands the work to that layer. Untagged keys (no cache, or somebody else's cache) go to stock sdpa, so
the implementation can stay set for good; not where ``generate`` was given our cache, and the model left it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from reasonalloc.engines.models import ATTENTION_NAME, UnsupportedModelError
from reasonalloc.engines.transformers.presence import check_presence

if TYPE_CHECKING:
    from reasonalloc.engines.transformers.cache import RaggedLayer

_TAG = "_reasonalloc_layer"
_REFUSED = ("softcap", "s_aux", "sliding_window", "position_bias")


def tag(key: Tensor, layer: RaggedLayer) -> Tensor:
    """A new view of ``key`` that carries its layer; the caller's own tensor object stays untouched."""
    key = key.view_as(key)
    setattr(key, _TAG, layer)
    return key


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """What a cache keeps must be ordinary tensors, which can be written in place later, outside an inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers wants it: ``[batch, heads, queries, dim]`` to ``[batch, queries, heads, dim]``."""
    layer: RaggedLayer | None = getattr(key, _TAG, None)
    if layer is None:
        if not torch.compiler.is_compiling():
            check_presence(module)
        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return out, None
    refused = [name for name in _REFUSED if kwargs.get(name) is not None]
    if refused:
        raise UnsupportedModelError(f"a ragged cache cannot serve attention with {', '.join(refused)}")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    with torch.inference_mode(False), torch.no_grad():  # as ordinary_tensors, without its cost in every layer
        chunk = layer.begin(attention_mask, query, kwargs.get("position_ids"))
        if chunk is not None and layer.ragged.is_new(chunk):
            out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling)
            layer.ragged.take(layer.index, chunk, query, key, value, scaling)
        elif chunk is not None:
            out = layer.ragged.attend(layer.index, chunk, query, key, value, scaling).transpose(1, 2).contiguous()
        else:
            out = layer.ragged.decode(layer.index, query, key, value, scaling).transpose(1, 2).contiguous()
        layer.ragged.end_layer(layer.index)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        out = _NoGradient.apply(out, query, key, value)
    return out, None


class _NoGradient(torch.autograd.Function):
    """Attention over a ragged cache, where gradients are enabled: using it is right, asking for a gradient is not."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, *states: Tensor) -> Tensor:
        """The output itself."""
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Refused: a gradient that stopped here would be wrong without a word."""
        raise RuntimeError(
            "a ragged cache has no gradients, because what it forgot is gone: train without it (cache=None, "
            "use_cache=False), and run the model under torch.no_grad() where no gradient is wanted"
        )


AttentionInterface.register(ATTENTION_NAME, attention_forward)
# Without a mask function of its own name, transformers passes no mask at all and padding is lost.
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
