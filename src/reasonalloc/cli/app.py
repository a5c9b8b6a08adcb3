"""The command line: ``reasonalloc generate | calibrate | profile | eval | report | problems | methods | plot | demo``.

One command, one file. A command imports what it needs when it runs, so that its help is there at once.
"""

from __future__ import annotations

import typer

from reasonalloc.cli.calibrate import calibrate
from reasonalloc.cli.demo import demo
from reasonalloc.cli.eval import evaluate
from reasonalloc.cli.generate import generate
from reasonalloc.cli.methods import methods
from reasonalloc.cli.plot import plot_app
from reasonalloc.cli.problems import problems
from reasonalloc.cli.profile import profile_app
from reasonalloc.cli.report import report

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Reasoning models in a small, fixed KV cache.")
app.command()(calibrate)
app.command("eval")(evaluate)
app.command()(report)
app.command()(problems)
app.command()(generate)
app.command()(methods)
app.command()(demo)
app.add_typer(plot_app, name="plot")
app.add_typer(profile_app, name="profile")
