"""A fresh cache for every call of ``generate``: for models that are enabled, and for ``custom_generate`` folders."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar, get_args

from reasonalloc.engines.models import ATTENTION_NAME, decoder_config, model_shape
from reasonalloc.engines.transformers.asked import compression_asked, field_of
from reasonalloc.engines.transformers.cache import Cache
from reasonalloc.engines.transformers.generation import decoding_loop
from reasonalloc.engines.transformers.loading import ranks
from reasonalloc.engines.transformers.names import CACHE_ARGUMENT, CACHE_NAMES, FIELD
from reasonalloc.engines.transformers.support import check_kind
from reasonalloc.policies.compression import Compression
from reasonalloc.policies.values import shown
from reasonalloc.policies.written import FIELDS, compression_of

Model = TypeVar("Model")
Loop = Literal["transformers", "reasonalloc"]
_NOTHING_ASKED = (
    "nothing says how much to keep: pass budget=256 (and method=..., profile=...), or compression=ra.Compression(...), "
    "or write the field {field!r} into the model's generation_config.json"
)


def enable(model: Model, compression: Compression | None = None) -> Model:
    """Give a model's ``generate`` a fresh compressed cache for every call.

        model = ra.enable(AutoModelForCausalLM.from_pretrained(path), ra.Compression(budget=256))
        pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)

    Calls do not share anything: several in a row, or from several threads, answer as each would alone. A call may ask
    for something else: ``generate(..., cache=...)`` with any cache, ``compression=...``, or fields of a
    ``Compression`` with ``method``, as ``generate(..., method="rkv", budget=128)``; each replaces all of the default.

    An assistant of another model (``assistant_model=``) keeps transformers' own cache while it guesses.

    The model's attention implementation is set to "reasonalloc", which is sdpa for every other cache. Only this model
    object is changed: its attribute ``generate``, as transformers itself does for models with code of their own. So the
    model refers to itself: after ``del model`` its memory is free once Python has collected garbage (``gc.collect()``).

    Args:
        model: a transformers model.
        compression: what every cache keeps. None: what ``model.generation_config.reasonalloc`` says, a mapping of the
            fields of a ``Compression``, with ``method``; a profile's path is relative to the model's folder.

    Returns:
        The model itself.

    Raises:
        UnsupportedModelError: a ragged cache cannot serve the model.
        ValueError: nothing says how much to keep, or it is said wrongly (the message names file and field), or the
            profile is of another model.
        TypeError: it is no model that generates.
    """
    _check_generates(model)
    field = None
    if compression is None:
        compression, field = _of_model(model)
        setattr(model.generation_config, FIELD, field)  # type: ignore[attr-defined]  # where transformers dropped it
    compression = _fresh(model, compression).compression  # whatever is wrong shows now; "auto" is calibrated once
    held = vars(model).get("generate")
    inner = held.inner if isinstance(held, Enabled) else held or partial(type(model).generate, model)  # type: ignore[attr-defined]
    model.generate = Enabled(model, inner, compression, copy.deepcopy(field))  # type: ignore[attr-defined]
    return model


def generate(
    model: Any, *inputs: Any, compression: Compression | None = None, loop: Loop = "transformers", **arguments: Any
) -> Any:
    """``model.generate`` with a fresh compressed cache: what a ``custom_generate`` folder runs.

    Args:
        model: a transformers model; its attention implementation is set to "reasonalloc".
        inputs: as of ``model.generate``.
        compression: what to keep; or give its fields: ``budget=256, method="rkv", profile="wave.json"``. Without
            either, the field ``reasonalloc`` of the model's generation_config decides.
        loop: who decodes: "transformers", or "reasonalloc", which is ``decoding_loop``.
        arguments: as of ``model.generate``. A cache among them is used as it is.

    Returns:
        What ``model.generate`` returns.

    Raises:
        UnsupportedModelError: a ragged cache cannot serve the model.
        ValueError: nothing says how much to keep, or two things do; another loop; or arguments that go without a
            cache, or with another one.
        TypeError: it is no model that generates.
    """
    _check_generates(model)
    if loop not in get_args(Loop):
        raise ValueError(f"loop must be one of {', '.join(get_args(Loop))}, got {shown(loop)}")
    if loop == "reasonalloc":
        arguments["custom_generate"] = decoding_loop
    chosen = _chosen(model, compression, inputs, arguments, lambda: _of_model(model)[0])
    return _run(partial(type(model).generate, model), model, chosen, inputs, arguments)


@dataclass(frozen=True, eq=False)
class Enabled:
    """What ``model.generate`` is after ``enable``.

    Attributes:
        model: the model.
        inner: its ``generate`` before.
        compression: the default.
        field: of the model's generation_config, from which the default was made; None if it was not.
    """

    model: Any
    inner: Callable[..., Any]
    compression: Compression
    field: Any = None

    def __call__(self, *inputs: Any, compression: Compression | None = None, **arguments: Any) -> Any:
        """Generate with a fresh cache, unless one is passed."""
        chosen = _chosen(self.model, compression, inputs, arguments, self._default)
        return _run(self.inner, self.model, chosen, inputs, arguments)

    def _default(self) -> Compression:
        now = getattr(self.model.generation_config, FIELD, self.field)  # a new one that does not name it: unchanged
        if self.field is not None and now != self.field:
            return _of_model(self.model)[0]
        return self.compression


def _check_generates(model: Any) -> None:
    if not hasattr(type(model), "generate"):
        raise TypeError(
            f"expected a model that generates, as AutoModelForCausalLM.from_pretrained loads it, got "
            f"{type(model).__name__}"
        )


def _of_model(model: Any) -> tuple[Compression, Any]:
    """What the model's generation_config asks for, and the field itself."""
    field = field_of(model)
    if field is None:
        raise ValueError(_NOTHING_ASKED.format(field=FIELD))
    return compression_asked(field, model.config), field


def _chosen(
    model: Any,
    compression: Compression | None,
    inputs: tuple[Any, ...],
    arguments: dict[str, Any],
    default: Callable[[], Compression],
) -> Compression | None:
    """What a call's cache keeps; None where the call brings its own, or makes guesses in assisted decoding.

    What says so is taken out of its arguments.

    Raises:
        ValueError: said twice.
    """
    fields = {name: arguments.pop(name) for name in FIELDS if name in arguments}
    written = arguments.pop(FIELD, None)
    said = [
        *(f"{name}=" for name in CACHE_NAMES if arguments.get(name) is not None),
        *(["compression="] if compression is not None else []),
        *([", ".join(f"{name}=" for name in fields)] if fields else []),
        *([f"{FIELD}="] if written is not None else []),
    ]
    if len(said) > 1:
        raise ValueError(f"{' and '.join(said)} all say what to keep: pass one of them")
    if any(arguments.get(name) is not None for name in CACHE_NAMES):
        return None
    if compression is not None:
        return compression
    if fields:
        return compression_of(fields, "this call of generate")
    passed = _passed(inputs, arguments)
    if getattr(passed, "is_assistant", False):  # its guesses are taken back, its settings are the other model's
        return None
    if written is None:
        written = getattr(passed, FIELD, None)
        if written is not None and written == field_of(model):  # a copy of the model's own
            written = None
    return default() if written is None else compression_asked(written, model.config)


def _run(
    inner: Callable[..., Any],
    model: Any,
    compression: Compression | None,
    inputs: tuple[Any, ...],
    arguments: Mapping[str, Any],
) -> Any:
    if compression is None:
        return inner(*inputs, **arguments)
    _check_arguments(model, inputs, arguments)
    return inner(*inputs, **{**arguments, CACHE_ARGUMENT: _fresh(model, compression)})


def _passed(inputs: tuple[Any, ...], arguments: Mapping[str, Any]) -> Any:
    """The generation_config of a call: its second argument, where it has no name."""
    return inputs[1] if len(inputs) > 1 else arguments.get("generation_config")


def _check_arguments(model: Any, inputs: tuple[Any, ...], arguments: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` for arguments that go without a cache, or ask for another."""
    settings = (_passed(inputs, arguments), model.generation_config)
    asked = [arguments.get("use_cache"), *(getattr(found, "use_cache", None) for found in settings)]
    if next((value for value in asked if value is not None), True) is False:
        raise ValueError(
            "use_cache=False leaves no cache to compress: leave it out, and set use_cache=True in the model's "
            "generation_config where it says False"
        )
    other = arguments.get("cache_implementation")
    if other is not None:
        raise ValueError(
            f"cache_implementation={other!r} asks for another cache than the compressed one: leave it out, or pass a "
            f"cache of your own as {CACHE_ARGUMENT}=..."
        )


def _fresh(model: Any, compression: Compression) -> Cache:
    """A cache for one call, and the attention that reads it."""
    config = model.config
    if getattr(decoder_config(config), "_attn_implementation", None) != ATTENTION_NAME:
        model_shape(config)  # refuses before anything is changed
        check_kind(config)
        model.set_attn_implementation(ATTENTION_NAME)
    return Cache(config, compression, tensor_parallel=ranks(model))
