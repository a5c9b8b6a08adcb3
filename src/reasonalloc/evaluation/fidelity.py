"""Fidelity: a fixed text, read with a compressed cache, against the same text read with the full cache.

It needs no capable model and no grading: every token's likelihood counts, so that minutes separate what accuracy would
need thousands of samples for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from reasonalloc.engines.transformers.cache import Cache
from reasonalloc.engines.transformers.loading import ranks
from reasonalloc.engines.transformers.names import CACHE_ARGUMENT
from reasonalloc.evaluation.footprint import Footprint
from reasonalloc.policies.compression import Compression


@dataclass(frozen=True)
class Trace:
    """A question and a text that answers it.

    Attributes:
        name: for tables.
        prompt: token ids of the question, with its chat template.
        answer: token ids of the text that is scored.
    """

    name: str
    prompt: Int[Tensor, "prompt"]
    answer: Int[Tensor, "answer"]


@dataclass(frozen=True)
class Fidelity:
    """How a text was read, at every position of the answer.

    Attributes:
        nll: negative log-likelihood of the text's own token, in nats.
        kl: divergence of the full cache's distribution from this one, KL(full || this), in nats; None without one.
        agree: whether the likeliest token is the full cache's; None without one.
        likeliest: whether the text's own token is the likeliest.
        kept_tokens: tokens per head held, averaged over layers, heads and decoded tokens.
        kv_bytes: of keys and values at their largest, see ``Footprint``.
        evicted: whether any token had been dropped at the end.
        log_probs: the whole distributions, if they were asked for.
    """

    nll: Float[np.ndarray[Any, Any], "answer"]
    kl: Float[np.ndarray[Any, Any], "answer"] | None
    agree: np.ndarray[Any, Any] | None
    likeliest: np.ndarray[Any, Any]
    kept_tokens: float
    kv_bytes: int
    evicted: bool
    log_probs: Float[Tensor, "answer vocabulary"] | None = None


@dataclass(frozen=True)
class Reading:
    """``Fidelity`` as it is kept: plain numbers.

    Attributes:
        nll, kl, agree: at every position of the text, see ``Fidelity``.
        kept_tokens, kv_bytes, evicted: see ``Fidelity``; ``evicted`` is None in results of a version that did not look.
    """

    nll: list[float]
    kl: list[float]
    agree: list[bool]
    kept_tokens: float
    kv_bytes: int
    evicted: bool | None = None

    @property
    def tokens(self) -> int:
        """How many were read."""
        return len(self.nll)


def read_alike(
    model: Any,
    traces: Sequence[Trace],
    compressions: Sequence[Compression],
    rows: Sequence[Sequence[int]],
) -> Iterator[list[Reading]]:
    """Some texts with several caches, each against the full cache, which reads them once.

    Args:
        model: with attn_implementation="reasonalloc".
        traces: the texts.
        compressions: the caches.
        rows: for each cache, which of the texts it reads.

    Yields:
        For each cache, what it made of its texts.
    """
    full = read_together(model, traces, Compression.method("full"), keep_log_probs=True)
    for compression, own in zip(compressions, rows, strict=True):
        texts, base = [traces[row] for row in own], [full[row] for row in own]
        if compression.budget is None:
            made = [_itself(one) for one in base]
        else:
            made = read_together(model, texts, compression, base)
        yield [_plain(one) for one in made]


def _plain(found: Fidelity) -> Reading:
    assert found.kl is not None
    assert found.agree is not None
    return Reading(
        [round(float(x), 6) for x in found.nll],
        [round(float(x), 6) for x in found.kl],
        [bool(x) for x in found.agree],
        found.kept_tokens,
        found.kv_bytes,
        found.evicted,
    )


def _itself(full: Fidelity) -> Fidelity:
    """The full cache against itself."""
    return replace(full, kl=np.zeros_like(full.nll), agree=np.ones(len(full.nll), dtype=bool))


def make_trace(tokenizer: Any, name: str, question: str, text: str, most: int | None = None) -> Trace:
    """A question, with the model's chat template, and the first ``most`` tokens of a text."""
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": question}]
        question = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    prompt = tokenizer(question, add_special_tokens=not tokenizer.chat_template).input_ids
    answer = tokenizer(text, add_special_tokens=False).input_ids
    return Trace(name, torch.tensor(prompt), torch.tensor(answer[:most]))


def teacher_force(
    model: Any,
    trace: Trace,
    compression: Compression,
    reference: Fidelity | None = None,
    keep_log_probs: bool = False,
) -> Fidelity:
    """Read one ``trace``; see ``read_together``."""
    return read_together(model, [trace], compression, None if reference is None else [reference], keep_log_probs)[0]


@torch.no_grad()
def read_together(
    model: Any,
    traces: Sequence[Trace],
    compression: Compression,
    references: Sequence[Fidelity] | None = None,
    keep_log_probs: bool = False,
) -> list[Fidelity]:
    """Read ``traces`` side by side with the given cache, one interval of tokens per forward pass.

    Nothing is evicted inside an interval, so this equals reading token by token, and is many times as fast. A text
    that has ended goes on, unread, up to the end of the interval, and then leaves the batch. A prompt that several
    traces share is read once. Scorers that draw at
    random draw by the row of the batch.

    Args:
        model: with attn_implementation="reasonalloc".
        traces: what is read.
        compression: the cache. An interval of 1 evicts after every token.
        references: the same traces with the full cache and ``keep_log_probs``; gives ``kl`` and ``agree``.
        keep_log_probs: keep all distributions: 4 bytes x answer x vocabulary for each trace, on the CPU.

    Raises:
        ValueError: no traces, an empty prompt or answer, a prompt of one token beside longer ones, or references
            without distributions or of other texts.
    """
    for trace in traces:
        if not len(trace.prompt) or not len(trace.answer):
            raise ValueError(
                f"trace {trace.name} has {len(trace.prompt)} prompt and {len(trace.answer)} answer tokens: "
                "one of each is the least"
            )
    if not traces:
        raise ValueError("there is no text to read")
    begun = int(min(len(trace.prompt) for trace in traces) == 1)  # to the cache, one token is a step, also as a prompt
    if begun and any(len(trace.prompt) > 1 for trace in traces):
        raise ValueError("a prompt of one token counts as a step: read it apart from longer ones")
    bases: list[Tensor | None] = [None] * len(traces)
    if references is not None:
        bases = [found.log_probs for found in references]
        if any(base is None for base in bases):
            raise ValueError("the reference has no distributions: make it with keep_log_probs=True")
        if [len(base) for base in bases if base is not None] != [len(trace.answer) for trace in traces]:
            raise ValueError("references must be of the same texts, in the same order")
    cache = Cache(model.config, compression, tensor_parallel=ranks(model))
    prompts, rows = _different([trace.prompt for trace in traces])
    ids, mask = _left_padded(prompts, model.device)
    lengths = [len(trace.answer) for trace in traces]
    answers = torch.nn.utils.rnn.pad_sequence([trace.answer for trace in traces], batch_first=True).to(model.device)
    position = mask.sum(-1, keepdim=True)
    padded = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if len(traces) > 1 else {}
    logits = model(ids, **padded, **{CACHE_ARGUMENT: cache}, logits_to_keep=1).logits
    if len(prompts) < len(traces):
        mask, position, logits = mask[rows], position[rows], logits[rows]
        cache.batch_select_indices(torch.tensor(rows))
    found = [_Parts() for _ in traces]
    alive, footprint = list(range(len(traces))), Footprint(len(traces))
    footprint.hold(alive)
    evicts = compression.budget is not None
    chunks = _chunks([length - 1 for length in lengths], compression.interval, evicts, begun)
    for first, last in [(-1, 0), *chunks]:
        if last:
            stay = [i for i, row in enumerate(alive) if lengths[row] - 1 > first]
            if len(stay) < len(alive):
                alive = [alive[i] for i in stay]
                mask, position = mask[stay], position[stay]
                cache.batch_select_indices(torch.tensor(stay))
                footprint.hold(alive)
            mask = torch.cat([mask, mask.new_ones(len(alive), last - first)], 1)
            steps = torch.arange(first, last, device=position.device)
            padded = {"attention_mask": mask, "position_ids": position + steps} if len(traces) > 1 else {}
            logits = model(answers[alive, first:last], **padded, **{CACHE_ARGUMENT: cache}).logits
            # Elsewhere it has evicted ahead of its time.
            if not evicts or last == 1 or (begun + last) % compression.interval == 0:
                footprint.look(cache, [row for row in alive if lengths[row] - 1 >= last])
        for row, own in zip(alive, logits, strict=True):
            to = min(last, lengths[row] - 1) + 1
            log_probs = own[: to - first - 1].float().log_softmax(-1)
            base = bases[row]
            full = None if base is None else base[first + 1 : to]
            found[row].add(log_probs, answers[row, first + 1 : to], full, keep_log_probs)
    costs = zip(lengths, footprint.kept, footprint.kv_bytes, footprint.evicted, strict=True)
    return [
        parts.together(_mean_held(length - 1, kept, chunks), kv_bytes * ranks(model), evicted)
        for parts, (length, kept, kv_bytes, evicted) in zip(found, costs, strict=True)
    ]


class _Parts:
    """What was found of one trace, stretch by stretch."""

    def __init__(self) -> None:
        self.nll: list[Tensor] = []
        self.kl: list[Tensor] = []
        self.agree: list[Tensor] = []
        self.likeliest: list[Tensor] = []
        self.log_probs: list[Tensor] = []

    def add(
        self,
        log_probs: Float[Tensor, "tokens vocabulary"],
        targets: Int[Tensor, "tokens"],
        base: Float[Tensor, "tokens vocabulary"] | None,
        keep: bool,
    ) -> None:
        """The next stretch, and what the full cache says of it."""
        self.nll.append(-log_probs.gather(-1, targets[:, None]).squeeze(-1).cpu())
        self.likeliest.append((log_probs.argmax(-1) == targets).cpu())
        if base is not None:
            base = base.to(log_probs.device)
            self.kl.append((base.exp() * (base - log_probs)).sum(-1).cpu())
            self.agree.append((base.argmax(-1) == log_probs.argmax(-1)).cpu())
        if keep:
            self.log_probs.append(log_probs.cpu())

    def together(self, kept_tokens: float, kv_bytes: int, evicted: bool) -> Fidelity:
        """All of it."""
        return Fidelity(
            torch.cat(self.nll).numpy(),
            torch.cat(self.kl).numpy() if self.kl else None,
            torch.cat(self.agree).numpy() if self.agree else None,
            torch.cat(self.likeliest).numpy(),
            kept_tokens,
            kv_bytes,
            evicted,
            torch.cat(self.log_probs) if self.log_probs else None,
        )


def _mean_held(tokens: int, looks: list[float], chunks: list[tuple[int, int]]) -> float:
    """Tokens held after each of a text's decoded tokens, on average; 0 without any.

    Args:
        tokens: how many were decoded.
        looks: tokens held at the end of every chunk that the text filled.
        chunks: where they begin and end. Within one every token is kept, and what is evicted goes with its last one.
    """
    total, before = 0.0, 0.0
    for i, (first, last) in enumerate(chunks):
        count = min(last, tokens) - first
        if count <= 0:
            break
        held = looks[i] if i < len(looks) else before + count
        total += (count - 1) * before + count * (count - 1) / 2 + held
        before = held
    return total / tokens if tokens else 0.0


def _different(prompts: Sequence[Tensor]) -> tuple[list[Tensor], list[int]]:
    """Each prompt once, and for every given one which of them it is."""
    places: dict[tuple[int, ...], int] = {}
    rows = [places.setdefault(tuple(prompt.tolist()), len(places)) for prompt in prompts]
    return [prompts[rows.index(place)] for place in range(len(places))], rows


def _left_padded(
    prompts: list[Tensor], device: torch.device
) -> tuple[Int[Tensor, "rows tokens"], Int[Tensor, "rows tokens"]]:
    """Prompts that end together, and where they are real."""
    width = max(map(len, prompts))
    ids = torch.stack([torch.nn.functional.pad(prompt, (width - len(prompt), 0)) for prompt in prompts])
    real = torch.stack([torch.arange(width) >= width - len(prompt) for prompt in prompts])
    return ids.to(device), real.long().to(device)


def _chunks(tokens: Sequence[int], interval: int, evicts: bool, begun: int) -> list[tuple[int, int]]:
    """Stretches between evictions; where nothing is evicted, ends of texts, which have so many tokens, part them, too.

    The first token goes alone: it tells the cache that decoding has begun. Of the first interval, ``begun`` steps are
    over before it.
    """
    most = max(tokens)
    edges = {0, min(1, most), *range(interval - begun, most, interval), most}
    return list(pairwise(sorted(edges if evicts else edges.union(tokens))))
