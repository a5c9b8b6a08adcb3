"""Pages to look at: what a recorder has seen, as one HTML file that needs nothing else."""

from reasonalloc.pages.compare import Comparison, compare
from reasonalloc.pages.view import view

__all__ = ["Comparison", "compare", "view"]
