"""What a ``Compression`` was made from, so that copies of it with changes are what the same call would have made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from reasonalloc.policies.methods import METHODS
from reasonalloc.policies.values import check_setting, tokens

PIN_SHARE = 0.75  # of the budget, that the tokens of a prompt may hold with prompt="pin"


def pinned_of(budget: int, prompt: object, share: float) -> int:
    """Tokens of a prompt that every head keeps for good at most."""
    return int(share * budget) if prompt == "pin" else 0


@dataclass(frozen=True)
class Asked:
    """Fields as they were given, before names became policies and None became what it stands for.

    Attributes:
        given: by the user.
        method: the method that set the others; "" if none did.
        read: what all fields read as in the end; empty before that.
    """

    given: Mapping[str, Any]
    method: str = ""
    read: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        own = {name: dict(value) if isinstance(value, Mapping) else value for name, value in self.given.items()}
        object.__setattr__(self, "given", own)

    def fields(self) -> dict[str, Any]:
        """The fields of ``Compression``: the method's at this budget, and over them what was given."""
        if not self.method:
            return dict(self.given)
        budget, method = self.given["budget"], METHODS[self.method]
        free = 0 if budget is None else tokens("budget", budget, 1)
        prompt = {**method.fixed, **self.given}.get("prompt")
        free -= pinned_of(free, prompt, check_setting("pin_share", self.given.get("pin_share", PIN_SHARE), "float"))
        return {**method.fields(free), **self.given}

    def changed(self, changes: Mapping[str, Any]) -> Asked:
        """The same with some fields given otherwise."""
        return Asked({**self.given, **changes}, self.method)

    def resolved(self, read: Mapping[str, Any]) -> Asked:
        """The same, once it is known what the fields read as. A profile's file is not read again."""
        given = {**self.given, **({"profile": read["profile"]} if "profile" in self.given else {})}
        return Asked(given, self.method, read)

    def reads_as(self, name: str, value: Any) -> bool:
        """Whether a field reads as ``value``; of objects, whether it is this very one."""
        known = self.read[name]
        return value is known or (isinstance(value, int | str) and value == known)
