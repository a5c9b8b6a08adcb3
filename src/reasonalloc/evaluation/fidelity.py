"""Fidelity: a fixed text, read with a compressed cache, against the same text read with the full cache.

It needs no capable model and no grading: every token's likelihood counts, so that minutes separate what accuracy would
need thousands of samples for.
"""

from __future__ import annotations

from collections.abc import Callable
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
        kept_tokens: tokens per head held, averaged over layers, heads and intervals.
        kv_bytes: of keys and values at their largest, see ``Footprint``.
        evicted: whether any token had been dropped at the end.
        log_probs: the whole distributions, if they were asked for.
    """

    nll: Float[np.ndarray[Any, Any], "answer"]
    kl: Float[np.ndarray[Any, Any], "answer"] | None
    agree: np.ndarray[Any, Any] | None
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
    model: Any, trace: Trace, compressions: list[Compression], read: Callable[[int], None] = lambda tokens: None
) -> list[Reading]:
    """One text with several caches, each against the full cache, which is read once.

    ``read`` is called with the number of its tokens after each of them.
    """
    full = teacher_force(model, trace, Compression.method("full"), keep_log_probs=True)
    found = []
    for compression in compressions:
        one = _itself(full) if compression.budget is None else teacher_force(model, trace, compression, full)
        read(len(trace.answer))
        found.append(
            Reading(
                [round(float(x), 6) for x in one.nll],
                [round(float(x), 6) for x in one.kl],  # type: ignore[union-attr]  # there is a reference
                [bool(x) for x in one.agree],  # type: ignore[union-attr]
                one.kept_tokens,
                one.kv_bytes,
                one.evicted,
            )
        )
    return found


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


@torch.no_grad()
def teacher_force(
    model: Any,
    trace: Trace,
    compression: Compression,
    reference: Fidelity | None = None,
    keep_log_probs: bool = False,
) -> Fidelity:
    """Read ``trace`` with the given cache, one interval of tokens per forward pass.

    Nothing is evicted inside an interval, so this equals reading token by token, and is many times as fast.

    Args:
        model: with attn_implementation="reasonalloc".
        trace: what is read; batch size 1.
        compression: the cache. An interval of 1 evicts after every token.
        reference: the same trace with the full cache and ``keep_log_probs``; gives ``kl`` and ``agree``.
        keep_log_probs: keep all distributions: 4 bytes x answer x vocabulary, on the CPU.

    Raises:
        ValueError: a prompt of less than two tokens, an empty answer, or a reference without distributions.
    """
    if len(trace.prompt) < 2 or not len(trace.answer):
        raise ValueError(
            f"trace {trace.name} has {len(trace.prompt)} prompt and {len(trace.answer)} answer tokens: "
            "two and one are the least"
        )
    if reference is not None and reference.log_probs is None:
        raise ValueError("the reference has no distributions: make it with keep_log_probs=True")
    cache = Cache(model.config, compression, tensor_parallel=ranks(model))
    answer = trace.answer.to(model.device)
    logits = [model(trace.prompt.to(model.device)[None], **{CACHE_ARGUMENT: cache}, logits_to_keep=1).logits[0]]
    nll, kl, agree, kept = [], [], [], []
    footprint, done = Footprint(1), 0
    for chunk in [*_chunks(len(answer) - 1, compression.interval), None]:
        log_probs = logits.pop().float().log_softmax(-1)
        targets = answer[done : done + len(log_probs)]
        nll.append(-log_probs.gather(-1, targets[:, None]).squeeze(-1).cpu())
        if reference is not None and reference.log_probs is not None:
            base = reference.log_probs[done : done + len(log_probs)].to(log_probs.device)
            kl.append((base.exp() * (base - log_probs)).sum(-1).cpu())
            agree.append((base.argmax(-1) == log_probs.argmax(-1)).cpu())
        if keep_log_probs:
            kept.append(log_probs.cpu())
        if chunk is not None:
            logits.append(model(answer[chunk][None], **{CACHE_ARGUMENT: cache}).logits[0])
            footprint.look(cache, [0])
        done += len(log_probs)
    return Fidelity(
        torch.cat(nll).numpy(),
        torch.cat(kl).numpy() if kl else None,
        torch.cat(agree).numpy() if agree else None,
        float(np.mean(footprint.kept[0])) if footprint.kept[0] else 0.0,
        footprint.kv_bytes[0] * ranks(model),
        footprint.evicted[0],
        torch.cat(kept) if kept else None,
    )


def _chunks(tokens: int, interval: int) -> list[slice]:
    """Stretches between evictions. The first token goes alone: it tells the cache that decoding has begun."""
    edges = sorted({0, min(1, tokens), *range(interval, tokens, interval), tokens})
    return [slice(a, b) for a, b in pairwise(edges)]
