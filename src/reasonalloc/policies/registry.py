"""Named policies: scorers and allocators found by name, from this package or from a plug-in."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

Policy = TypeVar("Policy")
PROFILE_SOURCES = "reasonalloc.profiles"  # the group of entry points


def unknown_name(kind: str, name: str, known: list[str]) -> ValueError:
    """The error for a name nobody registered: it names the value, the nearest name and all names."""
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return ValueError(f"unknown {kind} {name!r}.{hint} Known: {', '.join(sorted(known))}.")


class Registry(Generic[Policy]):
    """Classes of one kind of policy by name.

    A class enters by the decorator ``register("name")`` or, from an installed package, by an entry point in
    ``group``; entry points are read when a name is not found, so importing this package stays cheap.
    """

    def __init__(self, kind: str, group: str) -> None:
        self.kind = kind
        self.group = group
        self._classes: dict[str, type[Policy]] = {}

    def register(self, name: str) -> Callable[[type[Policy]], type[Policy]]:
        """Class decorator that enters a class under ``name``. Raises ``ValueError`` on a second, other class."""

        def enter(cls: type[Policy]) -> type[Policy]:
            known = self._classes.get(name)
            if known is not None and known.__qualname__ != cls.__qualname__:
                raise ValueError(f"{self.kind} {name!r} is already registered by {known.__module__}.{known.__name__}")
            self._classes[name] = cls
            return cls

        return enter

    def names(self) -> list[str]:
        """Every known name, sorted, those of installed plug-ins included."""
        return sorted({*self._classes, *(point.name for point in entry_points(group=self.group))})

    def create(self, policy: str | Mapping[str, Any] | Policy) -> Policy:
        """An instance: from a name with its defaults, from a name and settings, or ``policy`` itself.

            scorers.create("rkv"), scorers.create({"name": "rkv", "window": 16}), scorers.create(RKV())

        Raises ``ValueError`` for an unknown name, with the nearest one, and for an unknown setting.
        """
        if isinstance(policy, Mapping):
            return self._configured(dict(policy))
        if not isinstance(policy, str):
            return policy
        if policy not in self._classes:
            for point in entry_points(group=self.group, name=policy):
                self.register(policy)(point.load())
        if policy not in self._classes:
            raise unknown_name(self.kind, policy, self.names())
        return self._classes[policy]()

    def _configured(self, settings: dict[str, Any]) -> Policy:
        name = settings.pop("name", None)
        if not isinstance(name, str):
            raise ValueError(f"a {self.kind} with settings needs its name, got {settings}")
        policy = self.create(name)
        known = vars(policy)
        unknown = [setting for setting in settings if setting not in known]
        if unknown:
            raise unknown_name(f"setting of {self.kind} {name!r}:", unknown[0], list(known))
        return type(policy)(**{**known, **settings})

    def name_of(self, policy: Policy) -> str:
        """The registered name of an instance's class, or the class's own name where it is not registered."""
        names = [name for name, cls in self._classes.items() if cls is type(policy)]
        return names[0] if names else type(policy).__name__


def profile_source(name: str) -> Callable[..., Any]:
    """What makes a model's demand profile where a ``Compression`` names a source, ``"auto"``, in a profile's place.

    An entry point in the group "reasonalloc.profiles": called with the model's configuration and the compression.

    Raises:
        ValueError: no installed package offers this source.
    """
    for point in entry_points(group=PROFILE_SOURCES, name=name):
        return point.load()
    raise ValueError(
        f"profile={name!r} needs an installed reasonalloc (pip install -e .): sources of profiles are entry points"
    )
