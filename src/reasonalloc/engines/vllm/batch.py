"""What a forward pass does, read off what vLLM keeps on the host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reasonalloc.cache.step import Chunk
from reasonalloc.cache.table import HostInts, on_device

NULL = 0  # vLLM's null block, which no request gets: the arena of padding, and of steps that only warm up


@dataclass(frozen=True)
class PromptPart:
    """Tokens of one request's prompt in a batch.

    Attributes:
        chunk: as the cache takes it.
        tokens: where they lie in the batch.
        first: whether nothing came before them; the arena may hold what another request left.
    """

    chunk: Chunk
    tokens: slice
    first: bool


@dataclass(frozen=True)
class Batch:
    """What a forward pass does.

    Attributes:
        arenas: of the requests that decode one token, their prompts being complete; ``NULL`` for padding.
        rows: where these tokens lie in the batch: a slice if no others are between them.
        prompts: all others.
    """

    arenas: HostInts
    rows: Tensor | slice
    prompts: list[PromptPart]

    @classmethod
    def read(cls, description: Any, arenas: HostInts, device: torch.device) -> Batch:
        """
        Args:
            description: vLLM's ``CommonAttentionMetadata``; of its tensors only those on the host are read. It may have
                more requests than there are: one token of padding each, behind all others.
            arenas: ``[requests]``, in the order of the batch.
            device: where the model runs.
        """
        count = len(arenas)
        bounds = description.query_start_loc_cpu[: count + 1].tolist()
        lengths = description.seq_lens_cpu_upper_bound[:count].tolist()  # of prompts it is exact
        in_prompt = description.is_prefilling[:count].tolist()
        decoding, rows, prompts = [], [], []
        requests = zip(arenas.tolist(), bounds[:-1], bounds[1:], lengths, in_prompt, strict=True)
        for arena, start, stop, length, prompt in requests:
            if stop - start == 1 and not prompt:
                decoding.append(arena)
                rows.append(start)
            elif stop > start:
                chunk = Chunk.of(np.array([arena]), stop - start, ends_prompt=False)
                prompts.append(PromptPart(chunk, slice(start, stop), stop - start == length))
        padding = description.num_reqs - count
        assert not (padding and prompts), "a step that is padded for a CUDA graph decodes, and nothing else"
        decoding += [NULL] * padding
        rows += range(bounds[-1], bounds[-1] + padding)
        index: Tensor | slice = slice(0, 0)
        if rows and rows[-1] - rows[0] + 1 == len(rows):
            index = slice(rows[0], rows[-1] + 1)
        elif rows:
            index = on_device(np.array(rows), device)
        return cls(np.array(decoding, dtype=np.int64), index, prompts)

    @classmethod
    def padding(cls, description: Any) -> Batch:
        """Of a step without requests, in which vLLM warms up or records a graph. Only decoding is of use there."""
        count = description.num_reqs if description.max_query_len == 1 else 0
        return cls(np.full(count, NULL), slice(0, count), [])
