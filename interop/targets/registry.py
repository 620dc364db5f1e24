"""The registry of targets, best first for `auto`, and the choice among them."""

from craft_jax.errors import UsageError
from interop.craft.lineages import LINEAGES
from interop.errors import NotRepresentableError, listed
from interop.mapping.spec import ModelSpec
from interop.targets.base import Allowed, Answer, Target
from interop.targets.craft_torch import CraftTorch
from interop.targets.decoders import OPT, BioGPT
from interop.targets.gpt2 import GPT2
from interop.targets.nanogpt import NanoGPT
from interop.targets.torch_stacks import TorchDecoder, TorchEncoder, TorchTransformer

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        GPT2(),
        BioGPT(),
        OPT(),
        CraftTorch(),
        NanoGPT(),
        TorchEncoder(),
        TorchDecoder(),
        TorchTransformer(),
        *LINEAGES,
    )
}
HF_FAMILIES = tuple(name for name, target in TARGETS.items() if target.container == "hf")
GROUPS: dict[str, tuple[str, ...]] = {
    "auto": tuple(TARGETS),
    "hf": HF_FAMILIES,
    "craft": tuple(lineage.name for lineage in LINEAGES),
}
"""Names that stand for the best of several targets."""


def targets_for(spec: ModelSpec) -> list[Answer]:
    """Returns an answer for each target: the exact ones first, each group best first."""
    return sorted((target.answer(spec) for target in TARGETS.values()), key=lambda a: not a.exact)


def choose(spec: ModelSpec, to: str, family: str | None, allowed: Allowed) -> Target:
    """Returns the target for a model.

    Args:
      spec: the model.
      to: the name of a target, `hf` for the best family of Hugging Face, `craft` for the best
        generation of Craft, or `auto`.
      family: of Hugging Face; None for the best.
      allowed: approximations.

    Raises:
      UsageError: there is no such target, or family.
      NotRepresentableError: it cannot hold the model; names what can.
    """
    if to not in GROUPS and to not in TARGETS:
        raise UsageError(f"`target={to}` is not one of {', '.join((*GROUPS, *TARGETS))}")
    if family is not None and (family not in HF_FAMILIES or to not in ("auto", "hf", family)):
        raise UsageError(
            f"`family={family}` with `target={to}`: the families of `target=hf` are "
            + ", ".join(HF_FAMILIES)
        )
    names = GROUPS.get(family or to, (family or to,))
    chosen = TARGETS[min(names, key=lambda name: _distance(spec, TARGETS[name]))]
    try:
        chosen.fit(spec, allowed)
    except NotRepresentableError as error:
        others = [answer.target for answer in targets_for(spec) if answer.exact]
        raise NotRepresentableError(
            f"{error}; exact targets: {listed(others)}", **error.details
        ) from None
    return chosen


def _distance(spec: ModelSpec, target: Target) -> tuple[bool, bool, int]:
    """Orders targets: exact ones, those with approximations, those with the fewest obstacles."""
    answer = target.answer(spec)
    return not answer.exact, not answer.is_possible, len(answer.reasons)
