"""Which of transformers' models can read a ragged cache: what their classes say, and what is known of some types."""

from __future__ import annotations

from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from reasonalloc.engines.models import ATTENTION_NAME, UnsupportedModelError, decoder_config, refusal

# What a configuration does not tell. `python tests/model_sweep.py` finds them.
_TYPES = {
    "diffllama": "each of its layers attends twice",
    "git": "its text attention does not use transformers' attention interface, so it cannot be replaced",
    "doge": "it adds numbers of its own to the attention logits of each head",
    "jetmoe": "it changes keys after they are cached",
}
# These make a new cache for a text that grows beyond this field of the configuration.
_RESTARTING = {"phi3", "phimoe", "phi4_multimodal"}
_LENGTH = "original_max_position_embeddings"


def check_kind(config: Any) -> None:
    """Refuse a model that would not read a ragged cache, or leave it, whatever its attention implementation.

    Args:
        config: ``model.config``. Models that are not transformers' own are let through.

    Raises:
        UnsupportedModelError: it is such a model.
    """
    text = decoder_config(config)
    reasons = [reason for reason in (_by_class(config) or _by_class(text), _by_type(text), _restarts(text)) if reason]
    if reasons:
        raise UnsupportedModelError(refusal(text.model_type, reasons))


def check_model(config: Any) -> None:
    """The same, and refuse a model whose attention implementation does not read one.

    Raises:
        UnsupportedModelError: as ``check_kind``.
        ValueError: its attention implementation is set to another name.
    """
    check_kind(config)
    attention = getattr(decoder_config(config), "_attn_implementation", None)
    if attention not in (None, ATTENTION_NAME):
        raise ValueError(
            f"the model uses attention implementation {attention!r}, which cannot read a ragged cache: load it with "
            f"attn_implementation={ATTENTION_NAME!r} or call model.set_attn_implementation({ATTENTION_NAME!r}) first"
        )


def _by_class(config: Any) -> str:
    for models in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING):
        if type(config) not in models:
            continue
        model = models[type(config)]
        if model._is_stateful:
            return "it keeps a state beside keys and values"
        if not model._can_set_attn_implementation():
            return "it does not use transformers' attention interface, so its attention cannot be replaced"
    return ""


def _by_type(text: Any) -> str:
    return _TYPES.get(text.model_type, "")


def _restarts(text: Any) -> str:
    length = getattr(text, _LENGTH, None)
    if text.model_type in _RESTARTING and length and text.max_position_embeddings > length:
        return f"it throws its cache away when a text is longer than {length} tokens"
    return ""
