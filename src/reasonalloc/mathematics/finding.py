"""Which part of a text is its answer."""

from __future__ import annotations

import re

_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?:\{|(-?\d[\d.,]*))")


def last_box(text: str) -> str | None:
    """What the last ``\\boxed`` or ``\\fbox`` holds; None where there is no box.

    Only the last one counts, as for the graders published with MATH: boxes near one another are not joined, and an
    empty last box takes back what was said before. A box that is never closed is a text cut short: it holds nothing.
    """
    boxes = list(_BOX.finditer(text))
    if not boxes:
        return None
    found = boxes[-1]
    if found[1] is not None:
        return found[1].rstrip(".,")
    depth, escaped = 1, False
    for at in range(found.end(), len(text)):
        character = text[at]
        if escaped or character == "\\":
            escaped = not escaped
        elif character in "{}":
            depth += 1 if character == "{" else -1
            if not depth:
                return text[found.end() : at].strip()
    return ""
