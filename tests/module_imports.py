"""What a module imports, read from its source: every import at any depth, as the full name of a module."""

import ast
from dataclasses import dataclass


@dataclass(frozen=True)
class Module:
    """A file of the package: its full name, whether it is a package's ``__init__``, its source."""

    name: str
    package: bool
    source: str


@dataclass(frozen=True)
class Import:
    """One import: the module's full name ("" where it cannot be read), and when it happens."""

    name: str
    line: int
    deferred: bool  # inside a function
    typing: bool  # for type checkers only


class Imports(ast.NodeVisitor):
    """Collects all imports of a module of a package.

    Where the package's own top is imported, or a name of it, its name is among what is found.
    """

    def __init__(self, module, names):
        """``names``: of all modules, to tell ``from package import module`` from ``from module import name``."""
        self.module, self.names, self.top = module, names, module.name.partition(".")[0]
        self.found, self.deferred, self.typing = [], False, False
        self.visit(ast.parse(module.source))

    def add(self, name, line):
        self.found.append(Import(name, line, self.deferred, self.typing))

    def visit_inside(self, nodes, **state):
        before = {name: getattr(self, name) for name in state}
        vars(self).update(state)
        for node in nodes:
            self.visit(node)
        vars(self).update(before)

    def visit_FunctionDef(self, node):
        self.visit_inside(ast.iter_child_nodes(node), deferred=True)

    visit_AsyncFunctionDef = visit_Lambda = visit_FunctionDef

    def visit_If(self, node):
        typing = ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        self.visit_inside(node.body, typing=self.typing or typing)
        self.visit_inside([node.test, *node.orelse])

    def visit_Import(self, node):
        for alias in node.names:
            self.add(alias.name, node.lineno)
            if alias.name.startswith(f"{self.top}.") and alias.asname is None:
                self.add(self.top, node.lineno)  # the name that is bound is the top's

    def visit_ImportFrom(self, node):
        base = self.absolute(node.level, node.module or "")
        for alias in node.names:
            inner = f"{base}.{alias.name}"
            if inner not in self.names or base == self.top:
                self.add(base, node.lineno)
            if inner in self.names:
                self.add(inner, node.lineno)

    def visit_Call(self, node):
        self.generic_visit(node)
        function = ast.unparse(node.func).rpartition(".")[2]
        if function in ("import_module", "__import__"):
            values = [*node.args, *(keyword.value for keyword in node.keywords if keyword.arg == "name")]
            name = values[0].value if values and isinstance(values[0], ast.Constant) else ""
            dots = len(name) - len(name.lstrip("."))
            self.add(self.absolute(dots, name[dots:]), node.lineno)

    def absolute(self, dots, name):
        if not dots:
            return name
        parts = self.module.name.split(".")
        parts = parts[: len(parts) - dots + self.module.package]
        return ".".join([*parts, name] if name else parts)


def within(name, part):
    return name == part or name.startswith(f"{part}.")


def circles(modules, deferred):
    """Sets of modules that import each other, by imports at the top of files or, with ``deferred``, by all.

    Importing ``a.b.c`` runs ``a`` and ``a.b`` before, unless the importer lies in them: then they have begun already.
    """
    graph = {module.name: set() for module in modules}
    for module in modules:
        for found in Imports(module, set(graph)).found:
            if found.typing or (found.deferred and not deferred):
                continue
            names = found.name.split(".")
            runs = {".".join(names[: i + 1]) for i in range(len(names))}
            begun = {name for name in runs if within(module.name, name) and name != found.name}
            graph[module.name] |= (runs - begun) & set(graph)
    reached = {name: reach(graph, name) for name in graph}
    found = {frozenset(other for other in reached[name] if name in reached[other]) for name in graph}
    return sorted(sorted(circle) for circle in found if circle)


def reach(graph, start):
    """All that a module imports, itself if it is in a circle."""
    seen, waiting = set(), [start]
    while waiting:
        new = graph[waiting.pop()] - seen
        seen |= new
        waiting += new
    return seen
