"""vLLM runs in its own environment: `make test-vllm`. The rest of the suite does not need it and passes it over."""

collect_ignore_glob: list[str] = []
try:
    import vllm  # noqa: F401
except ImportError:
    collect_ignore_glob = ["test_*.py"]
