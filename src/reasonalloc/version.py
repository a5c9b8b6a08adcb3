"""The one place of the version: the build reads it here, and so does all that tells it."""

__version__ = "0.1.0"
