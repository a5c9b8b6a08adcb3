"""Options that several commands have, and how lists in them are read."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reasonalloc.cli.console import say

if TYPE_CHECKING:
    from reasonalloc.policies.compression import Compression

Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Window = Annotated[
    int | None, typer.Option(min=0, help="Newest tokens that every head keeps; default: the scorer's own.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, ...")]
Temperature = Annotated[float, typer.Option(min=0.0, help="Of sampling; 0 decodes greedily.")]
TopP = Annotated[float, typer.Option(min=0.0, max=1.0, help="Sample from the likeliest tokens of this probability.")]
ProtectPrompt = Annotated[bool, typer.Option("--protect-prompt", help="Keep the prompt, on top of the budget.")]
PinPrompt = Annotated[bool, typer.Option("--pin-prompt", help="Keep the prompt, inside the budget: up to 3/4 of it.")]

KEEPING = {"budget", "method", "profile", "interval", "window", "protect_prompt", "pin_prompt"}  # what caches keep


def given(context: typer.Context) -> list[str]:
    """Options that the command line names, as the command's parameters are called."""
    return [name for name in context.params if str(context.get_parameter_source(name)).endswith("COMMANDLINE")]


def asked_by(model: str) -> tuple[dict[str, Any], Compression] | None:
    """What a model's own folder asks for, field and compression, and says so; None if it asks for nothing."""
    from reasonalloc.engines.transformers.asked import compression_of_name, where

    found = compression_of_name(model)
    if found is not None:
        say(f"{where(model)}: {json.dumps(found[0])}")
    return found


def whole_numbers(text: str, option: str) -> list[int]:
    """Whole numbers with commas between them. Raises ``ValueError`` naming the option."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} takes whole numbers with commas between them, got {text!r}") from None


def prompt_of(protect: bool, pin: bool) -> dict[str, Any]:
    """``--protect-prompt`` and ``--pin-prompt`` as a field of ``Compression``; none without either.

    Raises:
        ValueError: both.
    """
    if protect and pin:
        raise ValueError("--protect-prompt keeps the prompt on top of the budget, --pin-prompt inside it: choose one")
    return {"prompt": "protect"} if protect else {"prompt": "pin"} if pin else {}
