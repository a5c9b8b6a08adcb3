"""A generation loop for ``model.generate(custom_generate=...)`` that lets finished sequences go."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from reasonalloc.engines.transformers.cache import Cache
from reasonalloc.engines.transformers.names import CACHE_ARGUMENT

OnStep = Callable[[Tensor, Tensor], None]  # rows, tokens
_PER_STEP = (
    "output_scores",
    "output_logits",
    "output_attentions",
    "output_hidden_states",
    "return_dict_in_generate",
)


def drop_finished(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    on_step: OnStep | None = None,
    **model_kwargs: Any,
) -> Tensor:
    """Greedy search or sampling in which a finished sequence leaves the batch, and its cache is freed.

        model.generate(**inputs, cache=cache, custom_generate=reasonalloc.drop_finished)

    The result is that of the stock loop (``[batch, length]``, padded at the end); while sampling, random numbers are
    drawn for the remaining sequences only, so a seed gives other samples than with the stock loop. Afterwards the
    cache holds the sequences that finished last; start the next batch with a new or a reset cache.

    ``generate(..., on_step=f)`` calls ``f(rows, tokens)`` at every step, while the cache still holds all ``rows``: the
    indices of the batch's sequences that are being written, and their newest tokens. (transformers gives a streamer
    to its own loops alone.)

    Raises:
        ValueError: per-step outputs were asked for, beams, or a cache that is not ``reasonalloc.Cache``.
    """
    cache = model_kwargs.get(CACHE_ARGUMENT)
    wanted = [name for name in _PER_STEP if getattr(generation_config, name, False)]
    if wanted or (generation_config.num_beams or 1) > 1:
        raise ValueError(f"drop_finished returns token ids only, without {', '.join(wanted) or 'beams'}")
    if not isinstance(cache, Cache):
        raise ValueError(f"drop_finished needs {CACHE_ARGUMENT}=reasonalloc.Cache(...), got {type(cache).__name__}")
    model_kwargs.pop("synced_gpus", None)
    pad = generation_config._pad_token_tensor
    pad_id = 0 if pad is None else int(pad)
    ends: list[Tensor | None] = [None] * len(input_ids)
    alive = torch.arange(len(input_ids), device=input_ids.device)
    outputs = model._prefill(input_ids, generation_config, model_kwargs)
    while True:
        model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
        logits = outputs.logits[:, -1].to(copy=True, dtype=torch.float32, device=input_ids.device)
        del outputs
        token = _choose(logits_processor(input_ids, logits), generation_config.do_sample)
        input_ids = torch.cat([input_ids, token[:, None]], 1)
        if on_step is not None:
            on_step(alive, token)
        done = stopping_criteria(input_ids, None)
        if bool(done.any()):
            for row in done.nonzero().flatten().tolist():
                ends[int(alive[row])] = input_ids[row]
            keep = (~done).nonzero().flatten()
            if not len(keep):
                break
            alive, input_ids = alive[keep], input_ids[keep]
            cache.batch_select_indices(keep)
            model_kwargs = {name: _select(value, keep, len(done)) for name, value in model_kwargs.items()}
        inputs = model.prepare_inputs_for_generation(input_ids, next_sequence_length=1, **model_kwargs)
        outputs = model(**inputs, return_dict=True)
    return torch.nn.utils.rnn.pad_sequence([row for row in ends if row is not None], True, pad_id)


def _choose(scores: Tensor, sample: bool) -> Tensor:
    if sample:
        return torch.multinomial(scores.softmax(-1), 1).squeeze(1)
    return scores.argmax(-1)


def _select(value: Any, keep: Tensor, batch: int) -> Any:
    if isinstance(value, Tensor) and value.dim() and len(value) == batch:
        return value[keep]
    return value
