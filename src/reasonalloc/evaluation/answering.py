"""Answering a batch of prompts inside a given cache, with what it cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from reasonalloc.compression import Compression
from reasonalloc.engines.transformers.cache import Cache
from reasonalloc.engines.transformers.generation import OnStep, drop_finished
from reasonalloc.engines.transformers.loading import encode
from reasonalloc.recorder import Recorder


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: 0 decodes greedily.
        top_p: share of the probability that is drawn from.
        max_new_tokens: longest answer.
    """

    temperature: float = 0.6
    top_p: float = 0.95
    max_new_tokens: int = 32768

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.max_new_tokens < 1:
            raise ValueError(f"temperature must be at least 0, top_p in (0, 1], max_new_tokens positive, got {self}")

    def options(self) -> dict[str, Any]:
        """As ``generate`` takes them."""
        if not self.temperature:
            return {"do_sample": False, "max_new_tokens": self.max_new_tokens}
        return {
            "do_sample": True,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": 0,
            "max_new_tokens": self.max_new_tokens,
        }


@dataclass(frozen=True)
class Answer:
    """What was written for one prompt.

    Attributes:
        text: raw, special tokens included, the end token excluded.
        tokens: how many were written, the end token included.
        finished: whether it ended by itself; False: the length limit cut it off.
        kept_tokens: tokens per head held, averaged over layers, heads and the decoding steps looked at.
        kv_bytes: largest share of the cache's key and value slots that fell to this sequence, in bytes.
    """

    text: str
    tokens: int
    finished: bool
    kept_tokens: float
    kv_bytes: int


class _Meter:
    """Looks at the cache every few steps, and notes each sequence's share."""

    def __init__(self, cache: Cache, rows: int, every: int) -> None:
        self.cache, self.every, self.step = cache, every, 0
        self.kept: list[list[float]] = [[] for _ in range(rows)]
        self.bytes = [0] * rows

    def __call__(self, rows: torch.Tensor, tokens: torch.Tensor) -> None:
        """To be called at every step, with the sequences that the cache holds."""
        if self.step % self.every == 0:
            slabs = [cache.slab for cache in self.cache.layer_caches if cache.slab is not None]
            kept = np.stack([slab.lengths for slab in slabs]).mean((0, 2)).tolist()
            share = sum(slab.kv_bytes for slab in slabs) // len(kept)
            for row, length in zip(rows.tolist(), kept, strict=True):
                self.kept[row].append(length)
                self.bytes[row] = max(self.bytes[row], share)
        self.step += 1


def answer(
    model: Any,
    tokenizer: Any,
    prompts: list[str],
    compression: Compression,
    sampling: Sampling,
    seed: int = 0,
    meter_every: int = 16,
    recorder: Recorder | None = None,
    on_step: OnStep | None = None,
) -> list[Answer]:
    """Answer every prompt, in one batch that sequences leave as they finish.

    Args:
        model: with attn_implementation="reasonalloc".
        tokenizer: the model's; its chat template is used if it has one.
        prompts: users' turns.
        compression: the cache.
        sampling: how tokens are chosen.
        seed: of torch's random numbers, for sampling.
        meter_every: steps between two looks at the cache.
        recorder: gets every routing, if given.
        on_step: called at every step, see ``drop_finished``.
    """
    inputs = encode(tokenizer, prompts, True, model.device)
    end = model.generation_config.eos_token_id
    ends = set(end) if isinstance(end, list) else {end}
    cache = Cache(model.config, compression, recorder=recorder)
    meter = _Meter(cache, len(prompts), meter_every)
    torch.manual_seed(seed)
    out = model.generate(
        **inputs,
        past_key_values=cache,
        custom_generate=drop_finished,
        on_step=lambda rows, tokens: [watch(rows, tokens) for watch in (meter, on_step) if watch],
        pad_token_id=tokenizer.pad_token_id,
        **sampling.options(),
    )
    written = out[:, inputs["input_ids"].shape[1] :].tolist()
    rows = zip(written, meter.kept, meter.bytes, strict=True)
    return [_describe(tokenizer, ids, ends, kept, kv_bytes) for ids, kept, kv_bytes in rows]


def _describe(tokenizer: Any, ids: list[int], ends: set[int], kept: list[float], kv_bytes: int) -> Answer:
    stops = [i for i, token in enumerate(ids) if token in ends]
    body = ids[: stops[0]] if stops else ids
    text = tokenizer.decode(body, skip_special_tokens=False)
    return Answer(text, len(body) + bool(stops), bool(stops), sum(kept) / len(kept), kv_bytes)
