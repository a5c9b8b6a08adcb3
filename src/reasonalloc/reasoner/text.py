"""How a problem is written for the small reasoner, and how what it wrote is read. One word is one token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from reasonalloc.reasoner.lookups import VOCABULARY
from reasonalloc.tasks import TASKS, Problem

PAD, BEGIN, THINK, ANSWER, END = "<pad>", "<question>", "<think>", "<answer>", "<end>"
SPECIAL = (PAD, BEGIN, THINK, ANSWER, END)
_CHAT = "{{ '" + BEGIN + " ' + messages[0]['content'] + ' " + THINK + "' }}"


@dataclass(frozen=True)
class Reading:
    """What a reasoner wrote, taken apart.

    Attributes:
        thought: everything up to the answer.
        answer: None if it never came to one.
        finished: whether it ended by itself.
    """

    thought: str
    answer: str | None
    finished: bool


def prompt_text(problem: Problem) -> str:
    """What the reasoner is given: the same as the tokenizer's chat template makes of the question."""
    return f"{BEGIN} {problem.question} {THINK}"


def solution_text(problem: Problem) -> str:
    """What it is trained to write."""
    return f"{problem.thought} {ANSWER} {problem.answer} {END}"


def read(written: str) -> Reading:
    """Take a text apart that was decoded with its special tokens, from behind the prompt on."""
    body, end, _ = written.partition(END)
    thought, mark, answer = body.partition(ANSWER)
    return Reading(thought.strip(), answer.strip() if mark else None, bool(end))


def vocabulary(families: tuple[str, ...]) -> list[str]:
    """Special tokens, then every word of the families and of the bare look-ups, in a fixed order."""
    words = [word for name in families for word in TASKS.create(name).vocabulary]
    return [*SPECIAL, *dict.fromkeys([*words, *VOCABULARY])]


def build_tokenizer(families: tuple[str, ...] = ("maps", "programs", "search")) -> Any:
    """A plain ``tokenizers`` tokenizer of whole words, with the chat template, for transformers."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {word: i for i, word in enumerate(vocabulary(families))}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, bos_token=BEGIN, eos_token=END)
    fast.add_special_tokens({"additional_special_tokens": [THINK, ANSWER]})
    fast.chat_template = _CHAT
    return fast
