"""The command line."""

from reasonalloc.cli.app import app

__all__ = ["app"]
