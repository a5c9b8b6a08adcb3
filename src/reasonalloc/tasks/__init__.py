"""Tasks that need their chain of thought: seeded generators of problems with a worked solution, and exact checkers.

Three families with different memory patterns: ``maps`` looks things up in its question over and over, ``programs``
writes intermediate results once and uses them again near and far, ``search`` explores and backtracks, so that much of
what was thought becomes irrelevant. Problems are words separated by blanks, for a small model with words as tokens.
"""

from reasonalloc.tasks.maps import Maps
from reasonalloc.tasks.programs import Programs
from reasonalloc.tasks.search import Search
from reasonalloc.tasks.task import TASKS, Problem, Split, Task, split_of

__all__ = ["TASKS", "Maps", "Problem", "Programs", "Search", "Split", "Task", "split_of"]
