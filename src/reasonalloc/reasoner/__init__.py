"""The small reasoner: a Llama trained from scratch on ``reasonalloc.tasks``, so that forgetting costs an answer."""

from reasonalloc.reasoner.text import Reading, build_tokenizer, prompt_text, read, solution_text

__all__ = ["Reading", "build_tokenizer", "prompt_text", "read", "solution_text"]
