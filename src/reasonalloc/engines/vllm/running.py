"""What the layers of a process share, and what a step does on the host: all of it before the model runs.

A CUDA graph replays what a layer does on the device; none of the layers' Python runs then. So a pass is prepared by the
metadata builder, which vLLM calls outside of the graph, and ended before the next one is prepared.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from reasonalloc.cache.ragged import RaggedCache
from reasonalloc.engines.vllm.batch import NULL, Batch
from reasonalloc.engines.vllm.metrics import Metrics
from reasonalloc.engines.vllm.model import ServedModel, layer_number

_logger = logging.getLogger("vllm.reasonalloc")  # below vLLM's own, so that it is shown as vLLM's are


class Running:
    """A cache in vLLM's memory, and the pass that it is in.

    Attributes:
        cache: of all layers.
        first: the first layer.
        memory: what it had. Where it has another one, this is over.
        metrics: what is counted.
        batch: what the present pass does.
        coming: vLLM's ``InputBatch`` of the pass that is prepared next; None for a pass without requests.
        owners: which request an arena belongs to.
    """

    def __init__(self, layers: Mapping[int, Any]) -> None:
        """With vLLM's attention layers, by their number, in order."""
        self.first = next(iter(layers.values()))
        self.memory: Tensor = self.first.kv_cache
        served: ServedModel = self.first.impl.served
        self.cache = RaggedCache(served.compression, served.shape)
        layouts = {number: served.layout(number, layer.kv_cache.dtype) for number, layer in layers.items()}
        self.cache.lend({number: layer.kv_cache for number, layer in layers.items()}, layouts, self.first.impl.most)
        self.metrics = Metrics(self.cache)
        self.batch: Batch | None = None
        self.coming: Any = None
        self.owners: dict[int, str] = {}
        self._is_announced = False

    @property
    def requests(self) -> int:
        """How many requests fit at once."""
        return self.cache.table.rows - 1

    def expect(self, batch: Any) -> None:
        """The next pass is one of these requests, vLLM's ``InputBatch``; their order is final when it is prepared."""
        self.coming = batch
        if not self._is_announced:
            self._is_announced = True
            self.metrics.show(self.requests)
            budget = self.cache.compression.budget
            _logger.info(
                "reasonalloc: %d requests fit at once, each %d tokens per head and layer on average",
                self.requests, budget,
            )  # fmt: skip

    @property
    def has_prompts(self) -> bool:
        """Whether one of the coming requests brings a part of its prompt."""
        coming = self.coming
        if coming is None:
            return False
        computed, whole = coming.num_computed_tokens_cpu, coming.num_prompt_tokens_cpu_tensor.numpy()
        return bool((computed[: coming.num_reqs] < whole[: coming.num_reqs]).any())

    def begin(self, description: Any) -> None:
        """Before a pass: the rows due from the last one are compressed, and all of the step's numbers are set.

        Args:
            description: vLLM's ``CommonAttentionMetadata``.
        """
        self.end()
        cache, coming, self.coming = self.cache, self.coming, None
        if coming is None:
            batch = Batch.padding(description)
        else:
            arenas = coming.block_table[0].get_numpy_array()[: coming.num_reqs, 0]
            batch = Batch.read(description, arenas, self.memory.device)
        padded = bool((batch.arenas == NULL).any())
        if padded and cache.table.seen[NULL] >= cache.compression.interval:
            cache.free([NULL])  # it takes one token a step, and has room for an interval
        cache.free([int(prompt.chunk.rows[0]) for prompt in batch.prompts if prompt.first])
        cache.begin(batch.arenas, [prompt.chunk for prompt in batch.prompts])
        if padded:
            cache.table.steps[NULL] = 0  # it is never due
        self.batch = batch

    @torch.inference_mode()
    def end(self) -> None:
        """The last pass has run: a round of the rows that are due, outside of any graph. Again, it does nothing."""
        self.cache.end_replayed()
        self.metrics.update()

    def free(self, requests: Collection[str]) -> None:
        """These requests have ended or were preempted: their arenas are empty, or another's already."""
        arenas = [arena for arena, name in self.owners.items() if name in requests]
        for arena in arenas:
            del self.owners[arena]
        self.cache.free(arenas)


def attentions(layers: Mapping[str, Any]) -> dict[int, Any]:
    """vLLM's attention layers that are served here, by their number, in order."""
    found = {layer_number(name): layer for name, layer in layers.items() if _is_served(layer)}
    return dict(sorted(found.items()))


def running(layers: Mapping[str, Any]) -> Running | None:
    """What serves these layers, in the memory that vLLM has bound to them; None while there is none.

    vLLM binds memory once to measure its graphs, and once more to serve.
    """
    one = next(filter(_is_served, layers.values()), None)
    known: Running | None = None if one is None else one.impl.running  # all have the same; several calls a step
    if known is not None and known.memory is known.first.kv_cache:
        return known
    found = attentions(layers)
    if not found or not next(iter(found.values())).kv_cache.numel():
        return None
    new = Running(found)
    for index, layer in enumerate(found.values()):
        layer.impl.serve(new, index)
    return new


def _is_served(layer: Any) -> bool:
    return isinstance(getattr(getattr(layer, "impl", None), "served", None), ServedModel)
