"""A tiny model reads prompts and more tokens, under a recorder."""

from __future__ import annotations

from typing import Any

import torch
from reference import prompts, tiny_model

import reasonalloc as ra
from reasonalloc import Recorder
from reasonalloc.engines.transformers.names import CACHE_ARGUMENT

STEPS = 26


def run(
    compression: ra.Compression, lengths: list[int], recorder: Recorder, look: Any = None, **options: Any
) -> tuple[ra.Cache, torch.Tensor, torch.Tensor]:
    """Read prompts of these lengths and then ``STEPS`` more tokens, one by one; ``look(cache)`` after every pass."""
    model = tiny_model()
    cache = ra.Cache(model.config, compression, attention="rows", recorder=recorder, **options)
    ids, mask = prompts(lengths)
    more = torch.randint(2, 97, (len(lengths), STEPS), generator=torch.Generator().manual_seed(3))
    text, whole = torch.cat([ids, more], 1), torch.cat([mask, torch.ones_like(more)], 1)
    with torch.no_grad():
        for end in (ids.shape[1], *range(ids.shape[1] + 1, text.shape[1] + 1)):
            begin = cache.get_seq_length()
            positions = (whole[:, :end].cumsum(1) - 1).clamp(min=0)[:, begin:end]
            model(text[:, begin:end], attention_mask=whole[:, :end], position_ids=positions, **{CACHE_ARGUMENT: cache})
            if look is not None:
                look(cache)
    return cache, text, mask
