"""A decoding loop for ``model.generate(custom_generate=...)``: finished sequences leave, steps are recorded on CUDA."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reasonalloc.engines.transformers.attention import ordinary_tensors
from reasonalloc.engines.transformers.cache import Cache
from reasonalloc.engines.transformers.continuation import GENERATE
from reasonalloc.engines.transformers.graph import GraphUse, StepGraph, problem
from reasonalloc.engines.transformers.names import CACHE_ARGUMENT
from reasonalloc.engines.transformers.presence import left_behind

OnStep = Callable[[Tensor, Tensor], None]  # rows, tokens
_PER_STEP = (
    "output_scores",
    "output_logits",
    "output_attentions",
    "output_hidden_states",
    "return_dict_in_generate",
)


def decoding_loop(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    on_step: OnStep | None = None,
    graph: bool = True,
    **model_kwargs: Any,
) -> Tensor:
    """Greedy search or sampling in which a finished sequence leaves the batch, and its cache is freed.

        model.generate(**inputs, cache=cache, custom_generate=reasonalloc.decoding_loop)

    The result is that of the stock loop (``[batch, length]``, padded at the end). While sampling a batch, random
    numbers are drawn for the rows that the cache still holds, so a seed gives other samples than with the stock loop
    as soon as one has left. Afterwards the cache holds the sequences that finished last.

    On CUDA a step of the model is recorded in a graph, and replayed from then on: ``cache.stats()`` says whether
    (``graph``) and what it takes. Hooks of the model run when a step is recorded, not when it is replayed. A graph is
    for a number of rows, so finished sequences stay in the cache until the others fit into half of it.
    ``generate(..., graph=False)`` decodes without.

    ``generate(..., on_step=f)`` calls ``f(rows, tokens)`` at every step: the indices of the batch's sequences that are
    being written, and their newest tokens. The cache holds these ``rows``, in their order, and with graphs between
    them some that have finished.

    ``generate(..., streamer=s)`` is given a token of each sequence at every step, padding for those that have finished.

    Args:
        model: with attn_implementation="reasonalloc"; it and all but ``on_step`` and ``graph`` come from ``generate``.
        input_ids: ``[batch, length]``, the prompts, padded at the beginning.
        logits_processor: what changes the scores before a token is chosen.
        stopping_criteria: what says which sequences have finished.
        generation_config: whether to sample, and the padding token.
        on_step: called at every step, see above.
        graph: whether steps may be recorded, see above.
        model_kwargs: the cache, the attention mask, and what else the model is given.

    Raises:
        ValueError: per-step outputs were asked for, beams, or a cache that is not ``reasonalloc.Cache``.
        UnsupportedModelError: the model does not go on with the cache that it was given.
        RuntimeError: the scores to draw from are not numbers.
    """
    streamer = _streamer()
    try:
        with ordinary_tensors():
            return _decoded(
                model, input_ids, logits_processor, stopping_criteria, generation_config, on_step, graph, streamer,
                model_kwargs,
            )  # fmt: skip
    finally:
        if streamer is not None:  # whoever reads from it would wait for ever
            streamer.end()


def _decoded(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    on_step: OnStep | None,
    graph: bool,
    streamer: Any,
    model_kwargs: dict[str, Any],
) -> Tensor:
    cache = _cache(generation_config, model_kwargs)
    model_kwargs.pop("synced_gpus", None)
    pad = generation_config._pad_token_tensor
    batch = _Batch(input_ids, 0 if pad is None else int(pad))
    steps = _Steps(model, cache, model_kwargs, graph)
    scores = steps.prefill(input_ids, generation_config)
    while True:
        scores = logits_processor(batch.ids, scores)
        tokens, broken = _choose(scores, generation_config.do_sample)
        batch.append(tokens)
        if on_step is not None:
            on_step(*batch.newest())
        done = _to_host(stopping_criteria(batch.ids, None), broken, batch.alive)
        if streamer is not None:
            streamer.put(batch.column().cpu())
        written = batch.alive
        batch.finish(done)
        if not batch.alive:
            steps.select(written)
            return batch.result()
        if len(batch.alive) < len(batch.ids) and not (steps.is_recorded and 2 * len(batch.alive) > len(batch.ids)):
            steps.select(batch.alive)
            batch.drop_idle()
        scores = steps.next(batch.ids)


def _streamer() -> Any:
    """What ``generate`` was given as its public parameter ``streamer``: it hands it to its own loops alone."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not GENERATE:
        frame = frame.f_back
    return None if frame is None else frame.f_locals.get("streamer")


def _cache(generation_config: Any, model_kwargs: dict[str, Any]) -> Cache:
    wanted = [name for name in _PER_STEP if getattr(generation_config, name, False)]
    if wanted or (generation_config.num_beams or 1) > 1:
        raise ValueError(f"decoding_loop returns token ids only, without {', '.join(wanted) or 'beams'}")
    cache = model_kwargs.get(CACHE_ARGUMENT)
    if not isinstance(cache, Cache):
        raise ValueError(f"decoding_loop needs {CACHE_ARGUMENT}=reasonalloc.Cache(...), got {type(cache).__name__}")
    return cache


def _choose(
    scores: Float[Tensor, "rows vocabulary"], sample: bool
) -> tuple[Int[Tensor, " rows"], Bool[Tensor, " rows"] | None]:
    """Each row's next token, and whether its scores are of no use."""
    if not sample:
        return scores.argmax(-1), None
    weights = scores.softmax(-1)
    # The numbers that torch.multinomial draws, which waits for the device to see whether all is well.
    return (weights / torch.empty_like(weights).exponential_(1)).argmax(-1), weights[:, 0].isnan()


def _to_host(done: Bool[Tensor, " rows"], broken: Bool[Tensor, " rows"] | None, alive: Sequence[int]) -> list[bool]:
    """Which rows have finished: the only wait for the device in a step.

    Raises:
        RuntimeError: the scores of a row in ``alive`` were of no use.
    """
    if broken is None:
        found: list[bool] = done.tolist()
        return found
    found, useless = torch.stack([done.to(broken.device), broken]).tolist()
    if any(useless[row] for row in alive):
        raise RuntimeError("no token can be drawn: the scores are nan, or infinite")
    return found


class _Batch:
    """The texts that are being written.

    Attributes:
        ids: ``[rows, columns]``, a row for each row of the cache.
        alive: the rows that are being written; the others, if any, have finished and are idle.
    """

    def __init__(self, ids: Int[Tensor, "rows columns"], pad: int) -> None:
        self.ids, self.alive, self._pad = ids, list(range(len(ids))), pad
        self._ends: list[Tensor] = [ids[:0]] * len(ids)  # finished texts, by sequence
        self._sequences = self.alive  # of each row
        self._place()

    def _place(self) -> None:
        """What is known of the rows, on the device."""
        device, rows = self.ids.device, len(self.ids)
        self._idle: Tensor | None = None
        numbers = [self.alive, [self._sequences[row] for row in self.alive]]
        self._rows, self._of = torch.tensor(numbers, dtype=torch.int64, device=device)
        self._of_rows = torch.tensor(self._sequences, device=device)
        if len(self.alive) < rows:
            self._idle = torch.ones(rows, dtype=torch.bool, device=device).index_fill_(0, self._rows, False)

    def append(self, tokens: Int[Tensor, " rows"]) -> None:
        """The rows' next tokens; padding, where a row is idle."""
        if self._idle is not None:
            tokens = tokens.masked_fill(self._idle, self._pad)
        self.ids = torch.cat([self.ids, tokens[:, None]], 1)

    def newest(self) -> tuple[Int[Tensor, " alive"], Int[Tensor, " alive"]]:
        """The sequences that are being written, and their newest tokens."""
        return self._of, self.ids[self._rows, -1]

    def column(self) -> Int[Tensor, " batch"]:
        """The newest token of each sequence, padding where it has finished."""
        return self.ids.new_full((len(self._ends),), self._pad).index_copy_(0, self._of_rows, self.ids[:, -1])

    def finish(self, done: Sequence[bool]) -> None:
        """These rows have finished; of idle ones it is known."""
        finished = [row for row in self.alive if done[row]]
        if not finished:
            return
        for row in finished:
            self._ends[self._sequences[row]] = self.ids[row].clone()
        self.alive = [row for row in self.alive if not done[row]]
        self._place()

    def drop_idle(self) -> None:
        """The idle rows have left the cache."""
        self.ids = self.ids[self._rows]
        self._sequences = [self._sequences[row] for row in self.alive]
        self.alive = list(range(len(self.alive)))
        self._place()

    def result(self) -> Int[Tensor, "batch columns"]:
        """All texts, padded at the end."""
        return torch.nn.utils.rnn.pad_sequence(self._ends, True, self._pad)


class _Steps:
    """The forward passes of a batch: eager, or recorded once and replayed."""

    def __init__(self, model: Any, cache: Cache, arguments: dict[str, Any], graph: bool) -> None:
        self._model, self._cache, self._arguments = model, cache, arguments
        self._graph: StepGraph | None = None
        self._replayed = 0  # steps of which ``arguments`` do not know yet
        cache.graph_use = GraphUse("" if graph else "graph=False was passed")

    @property
    def is_recorded(self) -> bool:
        """Whether the next step of the same rows is a replay."""
        return self._graph is not None and not self._graph.is_stale

    def prefill(self, ids: Int[Tensor, "rows columns"], generation_config: Any) -> Float[Tensor, "rows vocabulary"]:
        """Read the prompts: scores of what comes first."""
        seen = self._cache.get_seq_length()
        return self._after(self._model._prefill(ids, generation_config, self._arguments), ids.device, seen)

    def next(self, ids: Int[Tensor, "rows columns"]) -> Float[Tensor, "rows vocabulary"]:
        """Decode the newest tokens: scores of what comes next."""
        if not self.is_recorded:
            self._graph = None  # its memory is free before another one is recorded
            inputs = self._inputs(ids)
            self._record(inputs)
            if self._graph is None:
                seen = self._cache.get_seq_length()
                return self._after(self._model(**inputs, return_dict=True), ids.device, seen)
        assert self._graph is not None
        self._graph.ids.copy_(ids[:, -1:])
        self._cache.replay(self._graph.replay, self._graph.memory, self._graph.ids)
        self._replayed += 1
        return _scores(self._graph.logits, ids.device)

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows, in order."""
        held = self._cache.ragged.table.rows
        if len(rows) == held:
            return
        self._graph = None
        keep = torch.tensor(rows)
        self._cache.batch_select_indices(keep)
        self._arguments = {name: _select(value, keep, held) for name, value in self._arguments.items()}

    def _after(self, outputs: Any, device: torch.device, seen: int) -> Float[Tensor, "rows vocabulary"]:
        """A pass is done, before which the cache had seen so many tokens. Not every model returns its cache."""
        if outputs.get(CACHE_ARGUMENT, self._cache) is not self._cache or self._cache.get_seq_length() == seen:
            raise left_behind(self._model, seen)
        self._arguments = self._model._update_model_kwargs_for_generation(outputs, self._arguments)
        return _scores(outputs.logits[:, -1], device)

    def _inputs(self, ids: Int[Tensor, "rows columns"]) -> dict[str, Any]:
        """The model's arguments for the next step."""
        if self._replayed:
            self._arguments = self._model._update_model_kwargs_for_generation(
                {}, self._arguments, num_new_tokens=self._replayed
            )
            self._replayed = 0
        inputs: dict[str, Any] = self._model.prepare_inputs_for_generation(
            ids, next_sequence_length=1, **self._arguments
        )
        return inputs

    def _record(self, inputs: dict[str, Any]) -> None:
        """Record a step, if it can be. What cannot be recorded once is not tried again."""
        use = self._cache.graph_use
        found = use.problem or problem(self._model, self._cache.ragged, inputs)
        if not found:
            try:
                self._graph = StepGraph(self._model, self._cache.ragged, inputs)
            except Exception as error:
                self._cache.forget_pending()
                found = f"the model's step cannot be recorded: {_first_line(error)}"
                warnings.warn(f"decoding goes on without a CUDA graph, {found}", stacklevel=2)
        nbytes, seconds = (0, 0.0) if self._graph is None else (self._graph.nbytes, self._graph.seconds)
        self._cache.graph_use = GraphUse(found, max(use.nbytes, nbytes), use.seconds + seconds)


def _scores(logits: Float[Tensor, "rows vocabulary"], device: torch.device) -> Float[Tensor, "rows vocabulary"]:
    """A copy, as the logits of a prompt may be large, and a graph's are written again."""
    return logits.to(copy=True, dtype=torch.float32, device=device)


def _select(value: Any, keep: Tensor, batch: int) -> Any:
    if isinstance(value, Tensor) and value.dim() and len(value) == batch:
        return value[keep.to(value.device)]
    return value


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
