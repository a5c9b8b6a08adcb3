"""The cache that a user hands to ``model.generate(cache=...)``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import cache_utils

from reasonalloc.cache.layer_cache import LayerCache, NewTokens, Probe
from reasonalloc.cache.recorder import Recorder
from reasonalloc.cache.stats import CacheStats, collect
from reasonalloc.cache.totals import LayerBudgets, check_ranks
from reasonalloc.engines.models import ATTENTION_NAME, architecture, check_states, model_shape
from reasonalloc.engines.transformers.attention import tag
from reasonalloc.policies.allocation import HEAD_ALLOCATORS, LAYER_ALLOCATORS
from reasonalloc.policies.compression import AUTO_PROFILE, Compression
from reasonalloc.policies.registry import profile_source
from reasonalloc.policies.scoring import SCORERS


class _ForwardPass:
    """What all layers of one forward pass share: which of the new tokens are real. Computed once, by the first."""

    def __init__(self) -> None:
        self._mask: Tensor | None = None
        self._new: NewTokens | None = None

    def new_tokens(self, mask: Tensor | None, batch: int, columns: int) -> NewTokens:
        if mask is None:
            self.forget()
            return NewTokens.all_real(batch, columns)
        if mask is not self._mask or self._new is None:
            if mask.dtype != torch.bool:
                raise ValueError("a ragged cache reads boolean attention masks only; pass a 2-D padding mask")
            # The last query sees every real new token; whatever it does not see of them is padding.
            self._new = NewTokens.masked(mask[:, 0, -1, -columns:].expand(batch, -1))
            self._mask = mask
        return self._new

    def forget(self) -> None:
        """Let go of the mask: a chunk's has ``chunk * length`` entries."""
        self._mask = self._new = None


class RaggedLayer(cache_utils.CacheLayerMixin):
    """transformers' view of one ``LayerCache``: the storage is ragged, the length it reports is logical."""

    is_sliding = False
    is_compileable = False
    supports_early_init = False

    def __init__(self, cache: LayerCache, forward_pass: _ForwardPass, kv_heads: int) -> None:
        super().__init__()
        self.cache = cache
        self.kv_heads = kv_heads
        self.forward_pass = forward_pass
        self.pending = False

    def new_tokens(self, mask: Tensor | None, batch: int, columns: int) -> NewTokens:
        """Which tokens of this pass are real. Marks the update as consumed."""
        self.pending = False
        return self.forward_pass.new_tokens(mask, batch, columns)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Check what the model wants stored; slots are made by the first attention call."""
        check_states(key_states, self.kv_heads)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Tag the new keys with this layer; the attention function stores them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.pending = True
        return tag(key_states, self), value_states

    def get_seq_length(self) -> int:
        """Tokens seen, padding and evicted ones included: positions and prompt slicing depend on it."""
        return self.cache.seen_columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Masks are logical, too."""
        return self.cache.seen_columns + query_length, 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def reset(self) -> None:
        """Empty the layer."""
        self.cache.reset()
        self.pending = False
        self.is_initialized = False

    @property
    def record_past(self) -> bool:
        """Whether tokens are held back from eviction until ``crop``."""
        return self.cache.holding

    @record_past.setter
    def record_past(self, value: bool) -> None:
        self.cache.holding = value

    @property
    def is_croppable(self) -> bool:
        """Whether the newest tokens can be taken back: while they are held back from eviction."""
        return self.cache.holding

    def activate_past_recording(self) -> None:
        """Assisted decoding: wait with eviction until ``crop``."""
        self.cache.hold()

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest ``-tokens_to_remove`` tokens (0 or negative, as in transformers)."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes 0 or the negative number of tokens to remove, got {tokens_to_remove}")
        self.cache.rollback(-tokens_to_remove)

    def offload(self) -> None:
        """Not supported: a compressed cache is small."""
        raise NotImplementedError("a ragged cache cannot be offloaded")

    def prefetch(self) -> None:
        """Not supported, see ``offload``."""
        raise NotImplementedError("a ragged cache cannot be offloaded")


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
    ) -> None:
        """
        Args:
            config: ``model.config``.
            compression: what to keep.
            attention: backend for decoding: "auto", "rows" (plain torch), "compiled" (CPU, numba), "varlen" or
                "triton" (CUDA).
            recorder: gets every routing, if given.
            probe: watches a full cache (budget None) once per ``compression.interval``: calibration.
            tensor_parallel: ranks that share the model (``model.tp_size``). Each rank's cache holds its own heads and
                routes among them alone, with the same budget per head as every other: nothing is communicated, and
                budget does not move from one rank's heads to another's. With layers="dynamic" each rank measures
                its own heads' demand.

        Raises:
            UnsupportedModelError: the model's attention is not supported, see ``support.model_shape``.
            ValueError: there is no such backend, the model uses another attention implementation, the profile is of
                another model, or the ranks cannot share the heads or a policy that gives every head its own budget.
        """
        if not isinstance(compression, Compression):
            raise TypeError(f"expected a reasonalloc.Compression, got {type(compression).__name__}")
        if probe is not None and compression.budget is not None:
            raise ValueError(f"a probe watches a full cache: budget must be None, got {compression.budget}")
        whole = model_shape(config)
        self.shape = whole.split(tensor_parallel)
        if compression.profile == AUTO_PROFILE:
            source = profile_source(AUTO_PROFILE)
            compression = compression.replace(profile=source(config, compression))
        self.compression = compression
        if compression.demand_profile is not None:
            compression.demand_profile.check(whole, architecture(config))
        if tensor_parallel > 1:
            check_ranks(compression)
        self.recorder = recorder
        self.budgets = None if compression.budget is None else LayerBudgets(compression, self.shape)
        self._forward_pass = _ForwardPass()
        caches = [
            LayerCache(i, compression, self.budgets, attention, recorder, probe) for i in range(self.shape.layers)
        ]
        super().__init__(layers=[RaggedLayer(cache, self._forward_pass, self.shape.kv_heads) for cache in caches])

    @property
    def layer_caches(self) -> list[LayerCache]:
        """The engine-neutral caches of the layers."""
        return [layer.cache for layer in self.layers]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Hand a layer's new states to its cache.

        Raises:
            RuntimeError: an earlier layer's states were never attended to through this package.
        """
        if self.layers[layer_idx - 1].pending or self.layers[layer_idx].pending:
            raise RuntimeError(
                "the model's attention does not read the ragged cache: load the model with "
                f"attn_implementation={ATTENTION_NAME!r}, or call model.set_attn_implementation({ATTENTION_NAME!r})"
            )
        return self.layers[layer_idx].update(key_states, value_states, *args, **kwargs)

    def reset(self) -> None:
        """Empty the cache; it can then serve a new batch."""
        super().reset()
        self._forward_pass.forget()
        if self.budgets is not None:
            self.budgets.reset()

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given sequences, in that order; an index may be repeated."""
        rows = indices.nonzero().flatten().tolist() if indices.dtype == torch.bool else indices.tolist()
        for layer in self.layer_caches:
            layer.select_sequences(rows)
        if self.budgets is not None:
            self.budgets.select_sequences(rows)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Give each beam the history of the beam that it continues."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence ``repeats`` times."""
        slab = self.layer_caches[0].slab
        if slab is not None:
            self.batch_select_indices(torch.arange(slab.batch).repeat_interleave(repeats))

    def stats(self) -> CacheStats:
        """Bytes, kept tokens per layer and head, evictions."""
        compression = self.compression
        method = (
            {"scorer": "none", "layers": "full", "heads": "full"}
            if compression.budget is None
            else {
                "scorer": SCORERS.name_of(compression.token_scorer),
                "layers": LAYER_ALLOCATORS.name_of(compression.layer_allocator),
                "heads": HEAD_ALLOCATORS.name_of(compression.head_allocator),
            }
        )
        return collect(self.layer_caches, self.budgets, method)


def kv_bytes(cache: Any) -> int:
    """Bytes of the key and value tensors of our cache, or of transformers' DynamicCache."""
    if isinstance(cache, Cache):
        return cache.stats().kv_bytes
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if layer.keys is not None)
