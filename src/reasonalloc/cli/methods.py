"""``reasonalloc methods``: the table of methods."""

from __future__ import annotations

from reasonalloc.cli.console import console


def methods() -> None:
    """List all methods with their scorers and allocators."""
    from reasonalloc.policies.methods import METHODS

    rows = [("method", "scorer", "layers", "heads", "")]
    for name, method in METHODS.items():
        fixed = method.fixed if name != "full" else {}
        layers = fixed.get("layers", "-" if name == "full" else "wave/dynamic")
        rows.append((name, fixed.get("scorer", "-"), layers, fixed.get("heads", "-"), method.summary))
    widths = [max(len(row[i]) for row in rows) + 2 for i in range(4)]
    for *columns, summary in rows:
        line = "".join(f"{text:{width}}" for text, width in zip(columns, widths, strict=True))
        console.print(line.rstrip(), soft_wrap=True)
        if summary:
            console.print(f"    {summary}", soft_wrap=True)
    console.print("\nwave/dynamic: wave where a profile is given, else measured while decoding", soft_wrap=True)
