"""The command line: ``reasonalloc COMMAND``, see ``reasonalloc --help``.

One command, one file. A command imports what it needs when it runs, so that its help is there at once.
"""

from __future__ import annotations

import io
import sys
from typing import Annotated

import typer

from reasonalloc.cli.calibrate import calibrate
from reasonalloc.cli.compare import compare
from reasonalloc.cli.console import manner
from reasonalloc.cli.demo import demo
from reasonalloc.cli.eval import evaluate
from reasonalloc.cli.generate import generate
from reasonalloc.cli.lm_eval import lm_eval
from reasonalloc.cli.methods import methods
from reasonalloc.cli.plot import plot_app
from reasonalloc.cli.problems import problems
from reasonalloc.cli.profile import profile_app
from reasonalloc.cli.report import report
from reasonalloc.cli.view import view
from reasonalloc.version import __version__

_PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}
# Plain help: rich's tables cut the names of options at 80 columns. Errors end in `clear_errors`.
app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"reasonalloc {__version__}")
        raise typer.Exit


@app.callback()
def run(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print results and errors alone.")] = False,
    _: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Reasoning models in a small, fixed KV cache."""
    manner.debug, manner.quiet = debug, quiet
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a letter that a terminal lacks must not end long work
            stream.reconfigure(errors="replace")


app.command()(demo)
app.command()(generate)
app.command()(methods)
app.command()(calibrate)
app.add_typer(profile_app, name="profile")
app.command("eval")(evaluate)
app.command()(report)
app.command("lm-eval", context_settings=_PASSED_ON)(lm_eval)
app.command()(problems)
app.command()(view)
app.command()(compare)
app.add_typer(plot_app, name="plot")
