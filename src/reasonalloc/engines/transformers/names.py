"""Names that differ between versions of transformers."""

import transformers
from packaging.version import Version

# What models and `generate` call their cache; the old name still works after 5.24, with a warning at every call.
CACHE_ARGUMENT = "cache" if Version(transformers.__version__) >= Version("5.24") else "past_key_values"
