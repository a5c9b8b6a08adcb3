"""EleutherAI's lm-evaluation-harness, with our caches: its model type "reasonalloc".

The harness looks for no plug-ins: its command knows the models that it brings, and those that are imported before it
starts. So ``reasonalloc lm-eval ...`` imports ours and hands its arguments over; in Python, ``import
reasonalloc.harness.model`` does the same for ``lm_eval.simple_evaluate``.
"""
