"""``reasonalloc lm-eval``: EleutherAI's lm-evaluation-harness, with our caches."""

from __future__ import annotations

import typer

from reasonalloc.cli.console import USERS, fail


def lm_eval(context: typer.Context) -> None:
    """Run lm-evaluation-harness with our caches: --model reasonalloc.

    All that follows is the harness's own: `reasonalloc lm-eval run --help`.
    """
    from reasonalloc.harness.door import run

    try:
        run(context.args)
    except USERS as error:  # other errors are the harness's own, and shown as it shows them
        fail(error if str(error) else type(error).__name__)
