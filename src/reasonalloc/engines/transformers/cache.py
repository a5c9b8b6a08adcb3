"""The cache that a user hands to ``model.generate(cache=...)``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import cache_utils

from reasonalloc.cache.ragged import Probe, RaggedCache
from reasonalloc.cache.recorder import Recorder
from reasonalloc.cache.stats import CacheStats, collect
from reasonalloc.cache.step import Chunk
from reasonalloc.cache.totals import check_ranks
from reasonalloc.engines.models import ATTENTION_NAME, UnsupportedModelError, architecture, check_states, model_shape
from reasonalloc.engines.transformers.attention import ordinary_tensors, tag
from reasonalloc.engines.transformers.continuation import Continuation, Origin, no_new_tokens
from reasonalloc.engines.transformers.graph import GraphUse
from reasonalloc.engines.transformers.support import check_model
from reasonalloc.policies.allocation import HEAD_ALLOCATORS, LAYER_ALLOCATORS
from reasonalloc.policies.compression import AUTO_PROFILE, Compression
from reasonalloc.policies.registry import profile_source
from reasonalloc.policies.scoring import SCORERS


class _Pass:
    """What all layers of one forward pass share: prepared once, by the first."""

    def __init__(self, ragged: RaggedCache) -> None:
        self.ragged = ragged
        self.continuation = Continuation()
        self.chunk: Chunk | None = None

    def begin(self, mask: Tensor | None, batch: int, columns: int, positions: object) -> None:
        """Before the first layer: what comes, and whether it goes on with what is cached."""
        ragged, continuation, seen = self.ragged, self.continuation, self.ragged.columns
        if seen and batch != ragged.table.rows:
            raise ValueError(
                f"the cache holds {ragged.table.rows} sequences, and {batch} come: go on with the same batch, or pass "
                "a new cache, or call reset() on this one"
            )
        origin = Origin.find(batch, columns)
        continuation.check_call(origin, seen, columns)
        real = continuation.read(mask, batch, columns, seen)
        rows = np.arange(batch)
        if columns == 1 and real is None and seen and not ragged.holding:
            self.chunk = None
            continuation.note(None, origin.ids, seen, columns)
            ragged.begin(rows)
            return
        self.chunk = chunk = Chunk.of(rows, columns) if real is None else Chunk.masked(rows, real)
        if columns > 1:
            if seen:
                continuation.check_positions(positions, chunk, ragged.table.seen, seen)
            ragged.prompt_columns = None if origin.call is None else _real_columns(chunk, origin.call.text.shape[1])
        continuation.note(chunk.real, origin.ids, seen, columns)
        ragged.begin((), (chunk,), columns)


def _real_columns(chunk: Chunk, columns: int) -> int:
    """How many of a chunk's first columns are tokens, where padding is on the left, in its longest sequence."""
    padding = chunk.columns - int(chunk.counts.max(initial=0))
    return max(columns - padding, 0)


class RaggedLayer(cache_utils.CacheLayerMixin):
    """transformers' view of one layer of a ``RaggedCache``: storage is ragged, the length it reports is logical."""

    is_sliding = False
    is_compileable = False
    supports_early_init = False

    def __init__(self, index: int, forward_pass: _Pass) -> None:
        super().__init__()
        self.index = index
        self.forward_pass = forward_pass
        self.pending = False

    @property
    def ragged(self) -> RaggedCache:
        """The cache of all layers."""
        return self.forward_pass.ragged

    def begin(self, mask: Tensor | None, query: Tensor, positions: object) -> Chunk | None:
        """This layer attends now: the chunk that it brings, or None where every row decodes one token.

        Raises:
            UnsupportedModelError: nothing was stored since the layer last attended.
            RuntimeError: the layers do not come in their order.
        """
        if not self.pending:
            raise UnsupportedModelError(
                f"layer {self.index} attends twice to the same keys: a ragged cache stores them when they are attended "
                "to, once for every update"
            )
        self.pending = False
        if self.ragged.is_recording:  # the step is prepared, and what comes is not known
            return None
        if self.index == 0:
            self.forward_pass.begin(mask, query.shape[0], query.shape[2], positions)
        elif self.index != self.ragged.step.done:
            raise RuntimeError(
                f"layer {self.index} attends after {self.ragged.step.done} layers: layers must come in their order; "
                "call reset() on the cache, or make a new one"
            )
        return self.forward_pass.chunk

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Check what the model wants stored; slots are made by the first attention call."""
        check_states(key_states, self.ragged.shape.kv_heads)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Tag the new keys with this layer; the attention function stores them.

        Raises:
            ValueError: what is cached has another dtype.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.index == 0 and self.ragged.pools:
            pool = self.ragged.pools[0]
            held, come = (pool.keys.dtype, pool.values.dtype), (key_states.dtype, value_states.dtype)
            if come != held:
                raise ValueError(
                    f"the cache holds keys and values of {held}, and {come} come: run the model under the same "
                    "torch.autocast throughout, or call reset() on the cache"
                )
        self.pending = True
        return tag(key_states, self), value_states

    def get_seq_length(self) -> int:
        """Tokens seen, padding and evicted ones included: positions and prompt slicing depend on it."""
        return self.ragged.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Masks are logical, too.

        Raises:
            ValueError: there are no new tokens: ``generate`` cut off more than there was.
        """
        if not query_length:
            raise ValueError(no_new_tokens(self.ragged.columns))
        return self.ragged.columns + query_length, 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def reset(self) -> None:
        """A new text: the cache of all layers is emptied by ``Cache.reset``."""
        self.pending = False
        self.is_initialized = False

    @property
    def record_past(self) -> bool:
        """Whether tokens are held back from eviction until ``crop``."""
        return self.ragged.holding

    @record_past.setter
    def record_past(self, value: bool) -> None:
        self.ragged.holding = value

    @property
    def is_croppable(self) -> bool:
        """Whether the newest tokens can be taken back: while they are held back from eviction."""
        return self.ragged.holding

    def activate_past_recording(self) -> None:
        """Assisted decoding: wait with eviction until ``crop``."""
        self.ragged.hold()

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Take back the newest ``-tokens_to_remove`` tokens (0 or negative, as in transformers), of all layers.

        transformers asks every layer; the first one does it for all.
        """
        remove = int(tokens_to_remove)  # assisted decoding counts on the device
        if remove > 0:
            raise ValueError(f"crop takes 0 or the negative number of tokens to remove, got {remove}")
        if self.index == 0:
            with ordinary_tensors():
                self.ragged.rollback(-remove)

    def offload(self) -> None:
        """Not supported: a compressed cache is small."""
        raise NotImplementedError("a ragged cache cannot be offloaded")

    def prefetch(self) -> None:
        """Not supported, see ``offload``."""
        raise NotImplementedError("a ragged cache cannot be offloaded")


@dataclass(frozen=True)
class GenerationStats(CacheStats):
    """A cache's state, and what recording decoding steps took in the last call of ``decoding_loop``.

    Attributes:
        graph: why steps were not recorded in a CUDA graph; empty if they were.
        graph_bytes: memory of the largest graph beside the cache, given back at the end of the call.
        graph_seconds: that all recordings took.
    """

    graph: str
    graph_bytes: int
    graph_seconds: float


class Cache(cache_utils.Cache):
    """A KV cache of bounded size for any transformers decoder with full attention.

        model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="reasonalloc")
        cache = reasonalloc.Cache(model.config, reasonalloc.Compression(budget=256))
        model.generate(**inputs, cache=cache)  # past_key_values=cache before transformers 5.24

    Batches (padding on the left), sampling, several return sequences, beams, chunked prefill, several turns with
    one cache, assisted decoding (batch 1). Memory per sequence and layer: ``heads * (budget + interval)`` slots on
    average over layers, whatever is generated; with prompt="protect" the prompt's tokens come on top.
    """

    def __init__(
        self,
        config: Any,
        compression: Compression,
        *,
        attention: str = "auto",
        recorder: Recorder | None = None,
        probe: Probe | None = None,
        tensor_parallel: int = 1,
        layers_at_once: int | None = None,
    ) -> None:
        """
        Args:
            config: ``model.config``.
            compression: what to keep.
            attention: backend: "auto", "rows" (plain torch), "compiled" (CPU, numba) or "triton" (CUDA).
            recorder: gets every routing, if given.
            probe: watches a full cache (budget None) once per ``compression.interval``: calibration.
            tensor_parallel: ranks that share the model (``model.tp_size``). Each rank's cache holds its own heads and
                routes among them alone, with the same budget per head as every other: nothing is communicated, and
                budget does not move from one rank's heads to another's. With layers="dynamic" each rank measures
                its own heads' demand.
            layers_at_once: layers whose prompts are compressed together. None: one on a CPU, which takes least
                memory; eight elsewhere; all of them for dynamic layers on CUDA, so that memory stays where it is.

        Raises:
            UnsupportedModelError: the model is not supported, see ``engines.models.model_shape`` and ``support``.
            ValueError: there is no such backend, the model uses another attention implementation, the profile is of
                another model, the recorder records the tokens of another cache, or the ranks cannot share the heads or
                a policy that gives every head its own budget.
        """
        if not isinstance(compression, Compression):
            raise TypeError(f"expected a reasonalloc.Compression, got {type(compression).__name__}")
        if probe is not None and compression.budget is not None:
            raise ValueError(f"a probe watches a full cache: budget must be None, got {compression.budget}")
        whole = model_shape(config)
        check_model(config)
        self.shape = whole.split(tensor_parallel)
        if compression.profile == AUTO_PROFILE:
            source = profile_source(AUTO_PROFILE)
            compression = compression.replace(profile=source(config, compression))
        self.compression = compression
        compression.check_profile(whole, architecture(config))
        if tensor_parallel > 1:
            check_ranks(compression)
        self.ragged = RaggedCache(
            compression,
            self.shape,
            attention=attention,
            layers_at_once=layers_at_once,
            recorder=Recorder.attach(recorder, self.shape.layers, _in_words(compression)),
            probe=probe,
        )
        self._pass = _Pass(self.ragged)
        self.graph_use = GraphUse()
        super().__init__(layers=[RaggedLayer(index, self._pass) for index in range(self.shape.layers)])

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Hand a layer's new states to its cache.

        Raises:
            RuntimeError: an earlier layer's states were never attended to through this package.
        """
        if layer_idx >= len(self.layers):
            raise ValueError(
                f"the model has a layer {layer_idx}, the cache was made for {len(self.layers)} layers: "
                "make it from this model's config"
            )
        if self.layers[layer_idx - 1].pending or self.layers[layer_idx].pending:
            self.forget_pending()
            raise RuntimeError(
                "the model's attention does not read the ragged cache, or was interrupted before it did: load the "
                f"model with attn_implementation={ATTENTION_NAME!r}, or call "
                f"model.set_attn_implementation({ATTENTION_NAME!r}), and reset() on the cache; a model for which that "
                "changes nothing does not use transformers' attention interface and cannot be served"
            )
        return self.layers[layer_idx].update(key_states, value_states, *args, **kwargs)

    def reset(self) -> None:
        """Empty the cache; it can then serve a new batch."""
        super().reset()
        self.ragged.reset()
        self._pass.continuation = Continuation()
        self.graph_use = GraphUse()

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given sequences, in that order; an index may be repeated."""
        rows = indices.nonzero().flatten().tolist() if indices.dtype == torch.bool else indices.tolist()
        with ordinary_tensors():
            self.ragged.select(rows)
            self._pass.continuation.select(rows)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Give each beam the history of the beam that it continues."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence ``repeats`` times."""
        self.batch_select_indices(torch.arange(self.ragged.table.rows).repeat_interleave(repeats))

    def replay(self, step: Callable[[], None], memory: tuple[int, ...], ids: Tensor) -> None:
        """A decoding step that was recorded.

        Args:
            step: does the device's part.
            memory: ``RaggedCache.fixed_memory`` when it was recorded.
            ids: ``[rows, 1]``, the token of each sequence.

        Raises:
            RuntimeError: the cache's memory has moved since the step was recorded.
        """
        seen = self.ragged.columns
        self.ragged.replay(step, memory)
        self._pass.continuation.note(None, ids, seen, 1)

    def forget_pending(self) -> None:
        """No layer waits for its attention any more: the pass was broken off."""
        for layer in self.layers:
            layer.pending = False

    def stats(self) -> GenerationStats:
        """Bytes, kept tokens per layer and head, evictions, and what recorded steps take."""
        method = _policies(self.compression)
        use = self.graph_use
        return GenerationStats(
            **vars(collect(self.ragged, method)),
            graph=use.problem,
            graph_bytes=use.nbytes,
            graph_seconds=use.seconds,
        )


def _policies(compression: Compression) -> dict[str, str]:
    """The names of a compression's policies."""
    if compression.budget is None:
        return {"scorer": "none", "layers": "full", "heads": "full"}
    return {
        "scorer": SCORERS.name_of(compression.token_scorer),
        "layers": LAYER_ALLOCATORS.name_of(compression.layer_allocator),
        "heads": HEAD_ALLOCATORS.name_of(compression.head_allocator),
    }


def _in_words(compression: Compression) -> str:
    """A compression as a record tells it: method (if named), policies, budget, and how the prompt is kept."""
    if compression.budget is None:
        return "full cache"
    prompt = "" if compression.prompt == "compete" else f", prompt {compression.prompt}"
    parts = ", ".join(f"{name} {value}" for name, value in _policies(compression).items())
    if compression.asked is not None and compression.asked.method:
        parts = f"{compression.asked.method} ({parts})"
    return f"{parts}, budget {compression.budget}, interval {compression.interval}{prompt}"


def kv_bytes(cache: Any) -> int:
    """Bytes of the key and value tensors of our cache, or of transformers' DynamicCache."""
    if isinstance(cache, Cache):
        return cache.stats().kv_bytes
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if layer.keys is not None)
