"""Answering a batch of prompts inside a given cache, with what it cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers

from reasonalloc.cache.recorder import Recorder
from reasonalloc.engines.transformers.cache import Cache
from reasonalloc.engines.transformers.generation import OnStep, decoding_loop
from reasonalloc.engines.transformers.loading import encode, end_tokens, ranks
from reasonalloc.engines.transformers.names import CACHE_ARGUMENT
from reasonalloc.evaluation.footprint import Footprint
from reasonalloc.policies.compression import Compression


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

    def config(self, model: Any, tokenizer: Any) -> transformers.GenerationConfig:
        """As ``generate`` takes it. Nothing of the model's own but its special tokens: no penalties, no filters."""
        own = model.generation_config
        chosen = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return transformers.GenerationConfig(
            eos_token_id=own.eos_token_id,
            bos_token_id=own.bos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            max_new_tokens=self.max_new_tokens,
            use_cache=True,  # whatever the model was saved with after its training
            **(chosen if self.temperature else {"do_sample": False}),
        )


@dataclass(frozen=True)
class Answer:
    """What was written for one prompt.

    Attributes:
        text: raw, special tokens included, the end token excluded.
        tokens: how many were written, the end token included.
        finished: whether it ended by itself; False: the length limit cut it off.
        kept_tokens: tokens per head held, averaged over layers, heads and decoding steps.
        kv_bytes: of keys and values at their largest, see ``Footprint``.
        evicted: whether any token had been dropped when it ended; None in results of a version that did not look.
    """

    text: str
    tokens: int
    finished: bool
    kept_tokens: float
    kv_bytes: int
    evicted: bool | None = None


def answer(
    model: Any,
    tokenizer: Any,
    prompts: list[str],
    compression: Compression,
    sampling: Sampling,
    seed: int = 0,
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
        recorder: gets every routing, if given; and the text, if it records tokens.
        on_step: called at every step, see ``decoding_loop``.
    """
    inputs = encode(tokenizer, prompts, True, model.device)
    ends = end_tokens(model.generation_config)
    cache = Cache(model.config, compression, recorder=recorder, tensor_parallel=ranks(model))
    footprint = Footprint(len(prompts))

    def watch(rows: torch.Tensor, tokens: torch.Tensor) -> None:
        footprint.look(cache, rows.tolist())
        if on_step is not None:
            on_step(rows, tokens)

    torch.manual_seed(seed)
    out = model.generate(
        **inputs,
        **{CACHE_ARGUMENT: cache},
        custom_generate=decoding_loop,
        on_step=watch,
        generation_config=sampling.config(model, tokenizer),
    )
    if recorder is not None and recorder.tokens is not None:
        recorder.set_text(tokenizer, out, inputs["attention_mask"])
    written = out[:, inputs["input_ids"].shape[1] :].tolist()
    found = zip(written, footprint.kept, footprint.kv_bytes, footprint.evicted, strict=True)
    return [
        _describe(tokenizer, ids, ends, kept, kv_bytes * ranks(model), evicted)
        for ids, kept, kv_bytes, evicted in found
    ]


def _describe(
    tokenizer: Any, ids: list[int], ends: set[int], kept: list[float], kv_bytes: int, evicted: bool
) -> Answer:
    stops = [i for i, token in enumerate(ids) if token in ends]
    body = ids[: stops[0]] if stops else ids
    text = tokenizer.decode(body, skip_special_tokens=False)
    return Answer(text, len(body) + bool(stops), bool(stops), sum(kept) / len(kept), kv_bytes, evicted)
