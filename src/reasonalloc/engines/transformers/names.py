"""Names that differ between versions of transformers."""

import transformers
from packaging.version import Version

# What models and `generate` call their cache; the old name still works after 5.24, with a warning at every call.
CACHE_ARGUMENT = "cache" if Version(transformers.__version__) >= Version("5.24") else "past_key_values"
MODEL_CACHE_NAMES = ("cache", "past_key_values")  # of a model's argument, since 5.24 and before
CACHE_NAMES = (*MODEL_CACHE_NAMES, "cache_params")  # by which `generate` takes one, in any version
FIELD = "reasonalloc"  # of a generation_config.json: the compression that a model asks for
