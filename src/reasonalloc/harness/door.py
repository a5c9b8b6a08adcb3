"""The harness's own command, once it knows our model type."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def run(arguments: Sequence[str]) -> None:
    """What ``lm_eval ARGUMENTS`` does, with the model type "reasonalloc".

    Raises:
        ImportError: the harness is missing.
        SystemExit: as argparse ends a command.
    """
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        raise ImportError("this command needs the harness: pip install 'reasonalloc[lm-eval]'") from error
    from reasonalloc.harness import model  # noqa: F401 (makes itself known)

    sys.argv = ["lm_eval", *arguments]  # the harness reads no other
    cli_evaluate()
