"""Where a task's ``until`` ends a text, row by row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import StoppingCriteria

_MORE = 2  # tokens: a model may write a string in more of them than the tokenizer would


class Until(StoppingCriteria):
    """Ends every row as soon as one of the strings stands in what was written.

    The harness's own criterion ends a batch when all its rows are done, and cannot serve one that rows leave.

    Attributes:
        strings: any of them ends a text.
        columns: of the prompts, padding included; they are never looked at.
    """

    def __init__(self, tokenizer: Any, strings: Sequence[str], columns: int) -> None:
        self.tokenizer, self.strings, self.columns = tokenizer, [string for string in strings if string], columns
        sizes = (len(tokenizer.encode(string, add_special_tokens=False)) for string in self.strings)
        self.tail = max(sizes, default=0) + _MORE

    def __call__(self, input_ids: Int[Tensor, "rows columns"], scores: Any, **kwargs: Any) -> Bool[Tensor, " rows"]:
        """Which rows have ended."""
        written = input_ids[:, self.columns :][:, -self.tail :]
        found = [any(s in text for s in self.strings) for text in self.tokenizer.batch_decode(written)]
        return torch.tensor(found, device=input_ids.device)
