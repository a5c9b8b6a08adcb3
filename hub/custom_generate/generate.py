"""The door that transformers opens: ``model.generate(..., custom_generate="THIS FOLDER OR HUB ID")``."""

import reasonalloc


def generate(*inputs, model, **arguments):
    """``model.generate`` with a fresh compressed cache, see ``reasonalloc.generate``."""
    return reasonalloc.generate(model, *inputs, **arguments)
