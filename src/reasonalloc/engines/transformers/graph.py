"""A decoding step as a CUDA graph: recorded once, from the embedding to the logits, and started as one piece.

An eager step of a model is some thousand launches, which take the host longer than the device takes to carry them out.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reasonalloc.cache.ragged import RaggedCache
from reasonalloc.engines.models import decoder_config
from reasonalloc.engines.transformers.names import CACHE_ARGUMENT

_VARIES = ("input_ids", "position_ids", "attention_mask")  # what a recorded step gives the model by itself
_PLAIN = (bool, int, float, str, type(None))  # arguments that stay as they are


@dataclass(frozen=True)
class GraphUse:
    """What recording steps took in the last call of ``decoding_loop``.

    Attributes:
        problem: why steps were not recorded; empty if they were.
        nbytes: memory of the largest graph beside the cache, given back at the end of the call.
        seconds: of all recordings.
    """

    problem: str = "only reasonalloc.decoding_loop records steps"
    nbytes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Recorded:
    """A recorded function.

    Attributes:
        replay: does on the device all that the function did, with the same tensors.
        nbytes: memory that is kept for it.
    """

    replay: Callable[[], None]
    nbytes: int


def record(function: Callable[[], None], device: torch.device) -> Recorded:
    """Record what a function starts on a CUDA device. It is run twice, and carried out once.

    Raises:
        Exception: what the function raised, as where it waits for the device; or RuntimeError: a graph cannot hold it.
    """
    with torch.cuda.device(device):
        main, side = torch.cuda.current_stream(), _side_stream(torch.cuda.current_device())
        side.wait_stream(main)
        try:
            with torch.cuda.stream(side):
                function()  # what is made at the first run, kernels and workspaces, must be there
        finally:
            main.wait_stream(side)  # what was started is put back there
        graph = _recorded(function, main, side)
        pool = tuple(graph.pool())
        segments = torch.cuda.memory_snapshot()
    return Recorded(graph.replay, sum(x["total_size"] for x in segments if tuple(x["segment_pool_id"]) == pool))


def _recorded(function: Callable[[], None], main: torch.cuda.Stream, side: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
    """The graph of a function, recorded on ``side``; ``main`` is in use before and after."""
    graph = torch.cuda.CUDAGraph()
    raised: list[BaseException] = []

    def remembering() -> None:
        try:
            function()
        except BaseException as error:  # ending a recording that failed raises another one
            raised.append(error)
            raise

    try:
        # Other threads may go on using the device.
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            remembering()
    except BaseException as error:
        _put_right(graph, side)
        torch.cuda.set_stream(main)  # an end that fails leaves the other in use
        raise (raised[0] if raised else error) from None
    return graph


_BROKEN: list[torch.cuda.CUDAGraph] = []  # the allocator still asks them


def _put_right(graph: torch.cuda.CUDAGraph, side: torch.cuda.Stream) -> None:
    """After a recording that failed: until one succeeds, torch's random generator goes on as if it were recorded."""
    _BROKEN.append(graph)
    with (
        contextlib.suppress(RuntimeError),
        torch.cuda.graph(torch.cuda.CUDAGraph(), stream=side, capture_error_mode="thread_local"),
    ):
        torch.zeros(1, device=side.device)


@functools.cache
def _side_stream(device: int) -> torch.cuda.Stream:
    """One for each device, as torch keeps a workspace for every stream that was ever used."""
    return torch.cuda.Stream(device)


class StepGraph:
    """A decoding step of all rows of a cache, one token each.

    Attributes:
        memory: of the cache, as it was recorded (``RaggedCache.fixed_memory``); the graph is of no use with other.
        nbytes: memory that the graph keeps.
        seconds: that the recording took.
        ids: ``[rows, 1]``, the tokens that a step decodes.
    """

    def __init__(self, model: Any, ragged: RaggedCache, inputs: Mapping[str, Any]) -> None:
        """
        Args:
            model: of transformers.
            ragged: the model's cache.
            inputs: the model's arguments for the next step, cache included; ``problem`` has nothing against them.

        Raises:
            Exception: the model's step cannot be recorded. The cache is as before.
        """
        started = time.perf_counter()
        ids, positions = inputs["input_ids"], inputs["position_ids"]
        self.ids: Int[Tensor, "rows 1"] = ids.clone()
        self._model, self._ragged = model, ragged
        self._positions: Int[Tensor, "rows 1"] = positions.expand_as(ids).clone()
        self._inputs = {
            **inputs,
            "input_ids": self.ids,
            "position_ids": self._positions,
            # Masks of four dimensions are taken as they are: none is built, and nothing looks into the positions.
            "attention_mask": torch.ones(len(ids), 1, 1, 1, dtype=torch.bool, device=ids.device),
        }
        with ragged.recording():
            recorded = record(self._step, ids.device)
        self._positions.copy_(positions.expand_as(ids))
        self._replay, self.nbytes = recorded.replay, recorded.nbytes
        self.memory = ragged.fixed_memory
        self.seconds = time.perf_counter() - started

    def _step(self) -> None:
        self.logits: Float[Tensor, "rows vocabulary"] = self._model(**self._inputs, return_dict=True).logits[:, -1]
        self._positions.add_(1)

    @property
    def is_stale(self) -> bool:
        """Whether the cache's memory has moved since."""
        return self.memory != self._ragged.fixed_memory

    def replay(self) -> None:
        """Decode ``ids``, the device's part: ``RaggedCache.replay`` does the host's. ``logits`` are the outcome."""
        self._replay()


def problem(model: Any, ragged: RaggedCache, inputs: Mapping[str, Any]) -> str:
    """Why a model's step cannot be recorded, in one clause; empty if it may be tried.

    Args:
        model: of transformers.
        ragged: its cache.
        inputs: the model's arguments for the next step.
    """
    found = ragged.can_record
    if found:
        return found
    if decoder_config(model.config) is not model.config:
        return "the model is more than a text decoder"
    if (getattr(model, "tp_size", None) or 1) > 1:
        return "several processes share the model"
    if len({parameter.device for parameter in model.parameters()}) > 1:
        return "the model lies on several devices"
    ids, positions = inputs.get("input_ids"), inputs.get("position_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.shape[1] != 1:
        return "the model is not given one token id of each sequence"
    if not isinstance(positions, Tensor) or positions.shape not in ((1, 1), ids.shape):
        return "the model is not given one position of each sequence"
    known = (*_VARIES, CACHE_ARGUMENT)
    other = sorted(name for name, value in inputs.items() if name not in known and not isinstance(value, _PLAIN))
    return f"the model is given {', '.join(other)} at every step" if other else ""
