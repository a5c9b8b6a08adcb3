"""The harness runs in its own environment: `make test-lm-eval`. The rest of the suite does not need it."""

collect_ignore_glob: list[str] = []
try:
    import lm_eval  # noqa: F401
except ImportError:
    collect_ignore_glob = ["test_*.py"]
