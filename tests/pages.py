"""The pages of the documentation, read for what they promise: blocks of code, commands, links."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        *(
            ROOT / folder / "README.md"
            for folder in ("hub", "profiles", "results", "src/reasonalloc/reasoner/model", "studies")
        ),
        ROOT / "benchmarks/NOTES.md",
    ]
    if path.name != "CHANGELOG.md"  # it tells of what is gone, too
)
SHELLS = ("", "bash", "sh", "shell", "console")
CONNECTORS = {"|", "||", "&&", ";", "&", ">", ">>", "<", "(", ")", "do", "then"}
_FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
_INLINE = re.compile(r"(`+)(.+?)\1", re.DOTALL)
_LINK = re.compile(r"\]\(<?([^)\s>]+)>?\)|(?:src|href)=\"([^\"]+)\"")


@dataclass(frozen=True)
class Block:
    """Code on a page.

    Attributes:
        page: its path, from the repository's root.
        line: where the code begins, from 1.
        language: what the fence says, "" for nothing.
        code: the lines, without the fence's own indentation.
    """

    page: str
    line: int
    language: str
    code: str


def text(page: str) -> str:
    return (ROOT / page).read_text("utf-8")


def blocks(page: str) -> list[Block]:
    """All fenced blocks, in order."""
    whole, found = text(page), []
    for match in _FENCE.finditer(whole):
        indent = match[1]
        code = "".join(line.removeprefix(indent) for line in match[3].splitlines(keepends=True))
        found.append(Block(page, whole.count("\n", 0, match.start(3)) + 1, match[2], code))
    return found


def prose(page: str) -> str:
    """The page without its code; lines stay where they are."""

    def lines_alone(match: re.Match[str]) -> str:
        return "\n" * match[0].count("\n")

    return _INLINE.sub(lines_alone, _FENCE.sub(lines_alone, text(page)))


def commands(page: str) -> Iterator[tuple[int, list[str]]]:
    """Every call of ``reasonalloc`` with its line: what follows the name, in shell blocks, indented or inline code."""
    whole = text(page)
    sources = [(block.line, block.code) for block in blocks(page) if block.language in SHELLS]
    outside = _FENCE.sub(lambda match: "\n" * match[0].count("\n"), whole)
    sources += [(number, line) for number, line in _long_lines(outside) if line.startswith("    ")]
    sources += [
        (outside.count("\n", 0, match.start()) + 1, " ".join(match[2].split()))
        for match in _INLINE.finditer(outside)
        if match[2].startswith("reasonalloc ")
    ]
    for first, source in sources:
        for number, line in _long_lines(source):
            if "reasonalloc" in line:
                yield from ((first + number - 1, words) for words in _calls(line))


def _long_lines(source: str) -> Iterator[tuple[int, str]]:
    """Lines with those that a backslash continues, and the number of the first."""
    number = 1
    for line in source.replace("\\\n", "\\\0").split("\n"):
        yield number, line.replace("\\\0", " ")
        number += 1 + line.count("\0")


def _calls(line: str) -> Iterator[list[str]]:
    lexer = shlex.shlex(line.strip().removeprefix("$ "), posix=True, punctuation_chars=True)
    lexer.commenters, lexer.whitespace_split = "#", True
    try:
        words = list(lexer)
    except ValueError:  # no line of a shell: an apostrophe in a text
        return
    call: list[str] = []
    for word in [*words, ";"]:
        if word not in CONNECTORS:
            call.append(word)
            continue
        yield from _ours(call)
        call = []


def _ours(words: list[str]) -> Iterator[list[str]]:
    for at, word in enumerate(words):
        if "=" in word and at == 0:
            continue  # a variable before the command
        starts = word.rsplit("/", 1)[-1] == "reasonalloc" and all("=" in before for before in words[:at])
        if starts or (word == "reasonalloc" and words[at - 1] == "-m" and at > 1):
            yield words[at + 1 :]
            return


def links(page: str) -> Iterator[tuple[int, str]]:
    """Every link and picture with its line, addresses of the web left out."""
    whole = prose(page)
    for match in _LINK.finditer(whole):
        target = match[1] or match[2]
        if not re.match(r"[a-z]+:", target):
            yield whole.count("\n", 0, match.start()) + 1, target


def anchors(page: str) -> set[str]:
    """What a link's ``#...`` may name: headings by the rule of repositories' web views, and API names of the site."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.+?) *$", _FENCE.sub("", text(page)), re.MULTILINE):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").replace("*", "")
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        number = 0
        while (slug if not number else f"{slug}-{number}") in found:
            number += 1
        found.add(slug if not number else f"{slug}-{number}")
    return (
        found
        | set(re.findall(r"^::: (\S+)", text(page), re.MULTILINE))
        | set(re.findall(r'(?:id|name)="([^"]+)"', text(page)))
    )
