"""What the model type "reasonalloc" takes: the fields of a ``Compression``, and what the harness's own model takes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from reasonalloc.engines.transformers.asked import compression_asked, compression_of_name, field_of
from reasonalloc.policies.compression import Compression
from reasonalloc.policies.registry import unknown_name
from reasonalloc.policies.values import shown, tokens
from reasonalloc.policies.written import FIELDS, compression_of

MOST_TOKENS_WRITTEN = 256  # where a task does not say; the harness's own number
_REFUSED = {  # what the harness's own model takes, and this one does not
    "attn_implementation": "the ragged cache has an attention of its own, which is always set: leave it out",
    "autogptq": "pass a model that transformers loads by itself",
    "gptqmodel": "pass a model that transformers loads by itself",
    "mixed_precision_dtype": "load the model in that type: dtype=bfloat16",
    "peft": "merge the adapter into the model, save it and pass its folder",
    "softmax_dtype": "probabilities are always taken in float32: leave it out",
    "tp_plan": "ranks cannot share the model here; `reasonalloc eval --tensor-parallel` can",
}


@dataclass(frozen=True)
class Arguments:
    """What was asked for, once it is known to be right.

    Attributes:
        compression: the cache.
        max_gen_toks: the longest answer in tokens, where a task names none.
        own: the arguments of the harness's own model.
    """

    compression: Compression
    max_gen_toks: int
    own: Mapping[str, Any]

    @classmethod
    def of(cls, given: Mapping[str, Any], own: Collection[str]) -> Arguments:
        """Take apart what follows ``--model_args``.

        Args:
            given: values by name; ``method`` and all fields of a ``Compression`` among them. Without any of these, the
                field ``reasonalloc`` of the model's generation_config decides.
            own: names of the arguments that the harness's own model takes.

        Raises:
            ValueError: an unknown name (the nearest one is suggested), one that cannot be served, no ``pretrained``, or
                a value that no ``Compression`` takes. Where the model is asked, also that it is not there.
        """
        taken = (set(own) | {*FIELDS, "max_gen_toks", "device_map"}) - {*_REFUSED}
        for name, value in given.items():
            if name in _REFUSED and value not in (None, False):
                raise ValueError(
                    f"{name}={shown(value)} cannot be used with the model type reasonalloc: {_REFUSED[name]}"
                )
            if name not in taken and name not in _REFUSED:
                raise unknown_name("argument of the model type reasonalloc:", name, sorted(taken))
        if not given.get("pretrained"):
            raise ValueError("name a model: --model_args pretrained=MODEL,...")
        if given.get("backend", "default") not in ("default", "causal"):
            raise ValueError(f"backend must be causal, got {shown(given['backend'])}: other models have other caches")
        if not str(given.get("batch_size", 1)).isdigit() or int(given.get("batch_size", 1)) < 1:
            raise ValueError(
                f"batch_size must be a whole number, at least 1, got {shown(given['batch_size'])}: what 'auto' would "
                "try out is a dense pass, and says nothing of a compressed cache"
            )
        asked = {name: given[name] for name in FIELDS if name in given}
        compression = (None if asked else _of_model(given)) or compression_of(asked, "--model_args")
        most = tokens("max_gen_toks", given.get("max_gen_toks", MOST_TOKENS_WRITTEN), 1)
        rest = {name: given[name] for name in given if name in taken and name not in (*FIELDS, "max_gen_toks")}
        return cls(compression, most, rest)


def _of_model(given: Mapping[str, Any]) -> Compression | None:
    """What the model asks for itself, by its name or as an object; None if it asks for nothing, or is a GGUF file."""
    model = given["pretrained"]
    if given.get("gguf_file"):
        return None
    if isinstance(model, str):
        found = compression_of_name(model, given.get("revision"))
        return None if found is None else found[1]
    field = field_of(model)
    return None if field is None else compression_asked(field, model.config)
