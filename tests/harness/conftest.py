"""The harness runs in its own environment: `make test-lm-eval`. The rest of the suite does not need it."""

import importlib.util
import os
import tempfile

collect_ignore_glob: list[str] = []
if importlib.util.find_spec("lm_eval") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    _kept = tempfile.TemporaryDirectory(prefix="reasonalloc-datasets-")  # until the tests are over
    os.environ["HF_DATASETS_CACHE"] = _kept.name
