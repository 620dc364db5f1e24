"""Builds the PyTorch module of a kind of state dict, freshly initialised."""

from torch import nn

from interop.craft.torch_models import CraftB, CraftC, CraftD, CraftD0, CraftE, CraftF
from interop.pytorch.stacks import Model, Stack, TorchDecoder, TorchEncoder, TorchTransformer

KINDS: dict[str, type[Stack]] = {
    "torch-encoder": TorchEncoder,
    "torch-decoder": TorchDecoder,
    "torch-transformer": TorchTransformer,
    "craft-b": CraftB,
    "craft-c": CraftC,
    "craft-d": CraftD,
    "craft-d0": CraftD0,
    "craft-e": CraftE,
    "craft-f": CraftF,
}
"""The names that `build` takes."""


def build(kind: str, model: Model) -> nn.Module:
    """Returns a module with the tensors and the arithmetic of a kind, freshly initialised.

    Args:
      kind: one of `KINDS`.
      model: the fields of a `ModelSpec`.

    Raises:
      ValueError: no module of this kind can be such a model.
    """
    model = dict(model)
    for field, same in (("norm_bias", "bias"), ("final_norm_bias", "norm_bias")):
        if model[field] is None:
            model[field] = model[same]
    for field, value in ({"norm_bias": model["bias"]} | KINDS[kind].fixed).items():
        if model[field] != value:
            raise ValueError(f"{kind} has {field}={value!r}, not {model[field]!r}")
    return KINDS[kind](model)
