"""Named policies: scorers and allocators found by name, from this package or from a plug-in."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from inspect import Parameter, signature
from typing import Any, Generic, TypeVar

from reasonalloc.policies.values import check_setting, shown

Policy = TypeVar("Policy")
PROFILE_SOURCES = "reasonalloc.profiles"  # the group of entry points


def unknown_name(kind: str, name: Any, known: list[str]) -> ValueError:
    """The error for a name nobody registered: it names the value, the nearest name and all names."""
    near = difflib.get_close_matches(str(name), known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return ValueError(f"unknown {kind} {name!r}.{hint} Known: {', '.join(sorted(known))}.")


class Registry(Generic[Policy]):
    """Classes of one kind of policy by name.

    A class enters by the decorator ``register("name")`` or, from an installed package, by an entry point in
    ``group``; entry points are read when a name is not found, so importing this package stays cheap.
    """

    def __init__(self, kind: str, group: str, base: type) -> None:
        self.kind = kind
        self.group = group
        self.base = base
        self._classes: dict[str, type[Policy]] = {}

    def register(self, name: str) -> Callable[[type[Policy]], type[Policy]]:
        """Class decorator that enters a class under ``name``.

        The same class may come again, redefined: one of the same module and name, as when a notebook's cell runs
        twice. Raises ``ValueError`` on any other second class, and on one that is no policy of this kind.
        """
        if not isinstance(name, str) or not name:
            raise ValueError(f"a {self.kind} is registered under a name, register('name'), got {shown(name)}")

        def enter(cls: type[Policy]) -> type[Policy]:
            if not isinstance(cls, type) or not issubclass(cls, self.base):
                raise ValueError(f"{self.kind} {name!r} must be a subclass of {self.base.__name__}, got {shown(cls)}")
            known = self._classes.get(name)
            if known is not None and not _same(known, cls):
                raise ValueError(
                    f"{self.kind} {name!r} is already registered by {known.__module__}.{known.__qualname__}: "
                    f"choose another name for {cls.__module__}.{cls.__qualname__}"
                )
            self._classes[name] = cls
            return cls

        return enter

    def names(self) -> list[str]:
        """Every known name, sorted, those of installed plug-ins included."""
        return sorted({*self._classes, *(point.name for point in entry_points(group=self.group))})

    def create(self, policy: str | Mapping[str, Any] | Policy) -> Policy:
        """An instance: from a name with its defaults, from a name and settings, or ``policy`` itself.

            scorers.create("rkv"), scorers.create({"name": "rkv", "kernel": 5}), scorers.create(RKV())

        Raises:
            ValueError: an unknown name or setting, with the nearest one; a setting of the wrong type or without
                which the policy cannot be made; a class in place of an instance, or anything else.
        """
        if isinstance(policy, str):
            return self._configured({"name": policy})
        if isinstance(policy, Mapping):
            return self._configured(dict(policy))
        if not isinstance(policy, self.base):
            raise ValueError(self._what_is_wanted(policy))
        settings = {name: getattr(policy, name) for name in _settings(type(policy)) if hasattr(policy, name)}
        self._checked(type(policy).__name__, type(policy), settings)
        return policy

    def settings(self, name: str) -> list[str]:
        """What can be set of the class of this name. Raises ``ValueError`` for an unknown name."""
        return list(_settings(self._find(name)))

    def name_of(self, policy: Policy) -> str:
        """The registered name of an instance's class, or the class's own name where it is not registered."""
        names = [name for name, cls in self._classes.items() if _same(cls, type(policy))]
        return names[0] if names else type(policy).__name__

    def _find(self, name: str) -> type[Policy]:
        if name not in self._classes:
            for point in entry_points(group=self.group, name=name):
                self.register(name)(point.load())
        if name not in self._classes:
            raise unknown_name(self.kind, name, self.names())
        return self._classes[name]

    def _configured(self, settings: dict[str, Any]) -> Policy:
        name = settings.pop("name", None)
        if not isinstance(name, str):
            raise ValueError(f'a {self.kind} with settings needs its name, {{"name": ...}}, got {shown(settings)}')
        cls = self._find(name)
        known = _settings(cls)
        for setting in settings:
            if setting not in known:
                raise unknown_name(f"setting of {self.kind} {name!r}:", setting, list(known))
        for setting, parameter in known.items():
            if setting not in settings and parameter.default is Parameter.empty:
                raise ValueError(f'{self.kind} {name!r} needs {setting}: {{"name": {name!r}, {setting!r}: ...}}')
        return cls(**self._checked(name, cls, settings))

    def _checked(self, name: str, cls: type[Policy], settings: dict[str, Any]) -> dict[str, Any]:
        known = _settings(cls)
        return {
            key: check_setting(f"{key} of {self.kind} {name!r}", value, known[key].annotation)
            for key, value in settings.items()
        }

    def _what_is_wanted(self, got: Any) -> str:
        wanted = f'a {self.kind} is a name, {{"name": ...}} with settings, or a {self.base.__name__} object'
        if isinstance(got, type):
            return f"{wanted}, got the class {got.__name__}: write {got.__name__}()"
        return f"{wanted}, got {shown(got)}; names: {', '.join(self.names())}"


def _same(one: type, other: type) -> bool:
    """Whether two classes are one, perhaps defined twice."""
    return (one.__module__, one.__qualname__) == (other.__module__, other.__qualname__)


def _settings(cls: type) -> dict[str, Parameter]:
    by_name = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    return {name: parameter for name, parameter in signature(cls).parameters.items() if parameter.kind in by_name}


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
