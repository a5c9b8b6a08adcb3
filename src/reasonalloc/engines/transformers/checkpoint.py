"""A model from its files, with all of its weights."""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForCausalLM


def whole_model(source: str, **options: Any) -> Any:
    """``from_pretrained``, but weights that are missing are an error: transformers would put random numbers there.

    Raises:
        ValueError: weights are missing.
        Exception: whatever transformers raises for files that it cannot read.
    """
    network, found = AutoModelForCausalLM.from_pretrained(source, **options, output_loading_info=True)
    missing = sorted(found["missing_keys"])
    if missing:
        raise ValueError(f"{len(missing)} of its weights are not there, the first of them {missing[0]!r}")
    return network
