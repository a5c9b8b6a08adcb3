"""``reasonalloc methods``: the table of methods."""

from __future__ import annotations

from rich.table import Table

from reasonalloc.cli.console import console


def methods() -> None:
    """List the methods by name, with their scorer and allocators."""
    from reasonalloc.policies.methods import METHODS

    table = Table(box=None)
    for heading in ("method", "scorer", "layers", "heads"):
        table.add_column(heading, no_wrap=True)
    table.add_column("what it is")
    for name, method in METHODS.items():
        fixed = method.fixed if name != "full" else {}
        layers = fixed.get("layers", "" if name == "full" else "wave/dynamic")
        table.add_row(name, fixed.get("scorer", ""), layers, fixed.get("heads", ""), method.summary)
    console.print(table)
    console.print("wave/dynamic: wave where a profile is given, else measured while decoding", highlight=False)
