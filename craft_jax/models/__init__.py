"""The models by the name that a config gives them, `model.name`.

A class is imported on request, so that importing one model imports no other.
"""

import importlib

MODELS = {
    "gpt": "craft_jax.models.gpt:GPT",
    "transformer": "craft_jax.models.transformer:TransformerLM",
    "seq2seq": "craft_jax.models.seq2seq:Transformer",
    "flow": "craft_jax.models.flow:Flow",
}


def model_class(name: str) -> type:
    """Returns the `Model` with a name.

    Raises:
      KeyError: there is none.
    """
    module, _, cls = MODELS[name].partition(":")
    return getattr(importlib.import_module(module), cls)
