"""What mkdocs needs beside its plugins: repository files that pages link to, and the help of every command.

* A page's link to a file outside of ``docs/`` (``../results/x/report.md``) works in the repository's web view. In the
  site the file comes along, under ``repository/``: Markdown as a page, anything else as it is.
* ``<!-- every command -->`` becomes the ``--help`` of every command at 80 columns, as it is when the site is built.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).resolve().parent.parent
PLACE = "repository/"
COMMANDS = "<!-- every command -->"
LINK = re.compile(r"(\]\()([^)\s#:]+)((?:#[^)\s]*)?\))")  # of other pages: no anchors of this one, no addresses


def on_files(files: Files, config: Any) -> Files:
    """Add every repository file that a page links to, and those that these link to."""
    waiting = list(files.documentation_pages())
    while waiting:
        page = waiting.pop()
        for target in _outside(page.src_uri, page.content_string):
            name = PLACE + target
            if files.get_file_from_path(name) is None:
                file = File.generated(
                    config, name, abs_src_path=str(ROOT / target), inclusion=InclusionLevel.NOT_IN_NAV
                )
                files.append(file)
                if file.is_documentation_page():
                    waiting.append(file)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point links to where the files lie in the site, and write out the commands."""
    here = page.file.src_uri
    if here.startswith(PLACE):
        page.meta["search"] = {"exclude": True}  # the tables of every study would bury the pages about them

    def moved(link: re.Match[str]) -> str:
        target = _in_repository(here, link[2])
        site = target.removeprefix("docs/") if target.startswith("docs/") else PLACE + target
        return f"{link[1]}{posixpath.relpath(site, posixpath.dirname(here) or '.')}{link[3]}"

    return LINK.sub(moved, markdown).replace(COMMANDS, _commands() if COMMANDS in markdown else "")


def _in_repository(page: str, link: str) -> str:
    """A link's file, from the repository's root."""
    home = page.removeprefix(PLACE) if page.startswith(PLACE) else "docs/" + page
    return posixpath.normpath(posixpath.join(posixpath.dirname(home), link))


def _outside(page: str, markdown: str) -> Iterator[str]:
    for link in LINK.finditer(markdown):
        target = _in_repository(page, link[2])
        if not target.startswith("docs/") and (ROOT / target).is_file():
            yield target


def _commands() -> str:
    from typer.main import get_command
    from typer.testing import CliRunner

    from reasonalloc.cli import app

    def walk(command: Any, words: list[str]) -> Iterator[str]:
        shown = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "80"}, prog_name="reasonalloc").stdout
        title = " ".join(["reasonalloc", *words])
        yield f"## {title}\n\n```text\n{shown.strip()}\n```\n"
        for name, found in getattr(command, "commands", {}).items():
            yield from walk(found, [*words, name])

    return "\n".join(walk(get_command(app), []))
