"""A plugin for an unmodified vLLM: ragged budgets per layer and head for every request it serves.

Set REASONALLOC, for instance to '{"method": "reasonalloc", "budget": 1024, "profile": "wave.json"}', and vLLM finds
the rest by its entry point. Without it vLLM is left as it is.

How it fits: to vLLM's scheduler a request takes one block per layer, however long it grows; that block is an arena
(``reasonalloc.cache.arena``). vLLM's block tables, admission and preemption work on arenas without knowing.
"""
