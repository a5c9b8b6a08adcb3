"""The adapter to Hugging Face transformers: attention and mask functions, cache, generation loop."""

from reasonalloc.engines.transformers.attention import ATTENTION_NAME
from reasonalloc.engines.transformers.cache import Cache
from reasonalloc.engines.transformers.generation import decoding_loop

__all__ = ["ATTENTION_NAME", "Cache", "decoding_loop"]
