"""Which models and caches the adapter can serve; everything else is refused before any work is done."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch

from reasonalloc.policies.allocation import ModelShape

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ATTENTION_NAME = "reasonalloc"
FULL_ATTENTION = {"full_attention", "attention"}


class UnsupportedModelError(ValueError):
    """The model needs something that a ragged cache cannot give it (yet)."""


def decoder_config(config: Any) -> Any:
    """The configuration of the text decoder. Raises ``TypeError`` if ``config`` is no model configuration."""
    if not hasattr(config, "get_text_config"):
        hint = "; pass model.config, not the model" if hasattr(config, "config") else ""
        raise TypeError(f"expected a transformers model configuration, got {type(config).__name__}{hint}")
    return config.get_text_config(decoder=True)


def model_shape(config: Any) -> ModelShape:
    """The attention shape of a supported model.

    Raises:
        UnsupportedModelError: encoder-decoder, sliding-window, chunked, linear, latent (MLA), soft-capped or cross
            attention, attention sinks, layers that differ or share caches, or a quantised key/value cache.
    """
    text = decoder_config(config)
    reasons = [reason for reason in _reasons(config, text) if reason]
    if reasons:
        raise UnsupportedModelError(refusal(text.model_type, reasons))
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return ModelShape(text.num_hidden_layers, kv_heads, heads, head_dim)


def positions(config: Any) -> int | None:
    """Positions that the model was made for; None where its configuration does not say."""
    found: int | None = getattr(decoder_config(config), "max_position_embeddings", None)
    return found


def beyond_positions(config: Any, prompt: int, most: int) -> str:
    """What to say where an answer of ``most`` tokens may pass the model's last position; "" where it cannot.

    Args:
        config: the model's.
        prompt: tokens of the longest prompt.
        most: the longest answer, in tokens.
    """
    there = positions(config)
    if there is None or prompt + most <= there:
        return ""
    start = f"the model has {there:,} positions and the longest prompt {prompt:,} tokens"
    room = there - prompt
    if room < 1:
        return f"{start}: none is left for an answer; ask for less in the prompt"
    return (
        f"{start}: an answer of more than {room:,} tokens goes beyond what the model was made for; "
        f"max_new_tokens={room} (--max-new-tokens {room}) ends it there"
    )


def refusal(model_type: str, reasons: Sequence[str]) -> str:
    """What to say of a model that cannot be served."""
    return (
        f"a ragged cache cannot serve this {model_type} model: {'; '.join(reasons)}. "
        "Use transformers' own DynamicCache for it"
    )


def architecture(config: Any) -> dict[str, Any]:
    """What tells models of one attention shape apart, as plain JSON values; the weights are not in it."""
    text = decoder_config(config)
    names = ("model_type", "hidden_size", "intermediate_size", "vocab_size", "rope_parameters")
    return {name: json.loads(json.dumps(getattr(text, name, None))) for name in names}


def _reasons(config: Any, text: Any) -> list[str]:
    if getattr(text, "is_heterogeneous", False):  # asking for a field of which each layer has its own would raise
        return ["its layers have attention of different shapes"]
    if not all(hasattr(text, name) for name in ("num_attention_heads", "num_hidden_layers", "hidden_size")):
        return ["it is not one stack of layers with attention"]
    other = sorted(set(getattr(text, "layer_types", None) or ()) - FULL_ATTENTION)
    window = getattr(text, "sliding_window", None)
    windowed = (
        window is not None and getattr(text, "use_sliding_window", True) and not getattr(text, "layer_types", None)
    )
    kv_scheme = getattr(getattr(config, "quantization_config", None), "kv_cache_scheme", None)
    if isinstance(getattr(config, "quantization_config", None), dict):
        kv_scheme = config.quantization_config.get("kv_cache_scheme")
    return [
        "it is an encoder-decoder" if getattr(config, "is_encoder_decoder", False) else "",
        f"it has layers of {', '.join(other)}" if other else "",
        f"its attention slides over a window of {window} tokens" if windowed else "",
        "its attention is latent (MLA)" if getattr(text, "kv_lora_rank", None) else "",
        "its attention logits are soft-capped" if getattr(text, "attn_logit_softcapping", None) else "",
        "its layers share key/value caches" if getattr(text, "num_kv_shared_layers", 0) else "",
        "it has cross-attention layers" if _crosses(text) else "",
        "its attention has sinks" if text.model_type == "gpt_oss" else "",
        "its key/value cache is quantised" if kv_scheme is not None else "",
    ]


def _crosses(text: Any) -> bool:
    return bool(getattr(text, "cross_attention_layers", None) or getattr(text, "add_cross_attention", False))


def check_states(key: torch.Tensor, kv_heads: int) -> None:
    """Refuse key states that cannot be stored, or are not of so many heads.

    Raises ``UnsupportedModelError``; ``ValueError`` for other heads.
    """
    if key.shape[1] != kv_heads:
        raise ValueError(
            f"the model hands over {key.shape[1]} key/value heads per layer, the cache was made for {kv_heads}: a "
            "tensor-parallel model needs Cache(..., tensor_parallel=model.tp_size)"
        )
    if key.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise UnsupportedModelError(
            f"a ragged cache stores {names}; this model's keys are {key.dtype} (quantised cache?)"
        )
    if key.device.type == "mps":
        raise UnsupportedModelError(
            "budgets are computed in float64, which the mps device does not have; use cpu or cuda"
        )
