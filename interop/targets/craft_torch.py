"""craft-torch: a folder with one torch-only file, `modeling_craft.py`, that has every feature.

Its parameters have the paths and layouts of craft_jax, so its table renames nothing.
"""

from collections.abc import Mapping
from typing import Any

from interop.errors import UnknownArchitectureError
from interop.mapping.shapes import patterns
from interop.mapping.spec import FlowSpec, ModelSpec, Spec, read_spec
from interop.mapping.table import Rule, Table, Tap, rule
from interop.targets.base import Reading, Target

FORMAT = 1
"""Version of config.json; `modeling_craft.py` refuses later ones."""


_CAUSES = {
    "embedding": "the rows of the table",
    "norm": "epsilon, scale or bias of the layer norm, or its place",
    "attn": "the heads, or a kernel of query, key, value or out",
    "cross": "the memory, or a kernel of query, key, value or out",
    "mlp": "the activation, or a kernel of up or down",
    "patch_embedding": "the size or order of patches, or their kernel",
    "time_embedding": "the frequencies, or the kernel of up or down",
    "modulation": "the condition, or the kernel that makes scale, shift and gate of it",
}


def _module(leaf: str) -> str:
    """Returns the part of a model that a leaf belongs to: an attention, an MLP, a norm, a table."""
    parts = leaf.split(".")
    for i, part in enumerate(parts):
        if part in ("attn", "cross", "mlp", "time_embedding"):
            return ".".join(parts[: i + 1])
    return leaf.rpartition(".")[0]


def class_of(spec: Spec) -> str:
    """Returns the class of `modeling_craft.py` that is such a model."""
    if not spec.is_of_tokens:
        return "CraftFlow"
    return "CraftForSeq2Seq" if spec.num_decoder_layers else "CraftForCausalLM"


class CraftTorch(Target):
    """One torch-only file with every feature of craft_jax, and safetensors."""

    name = "craft-torch"
    summary = "one torch-only file with every feature of craft_jax, and safetensors"
    container = "craft-torch"
    anchor = "token_embedding.embedding"
    other_anchors = ("patch_embedding.kernel",)
    model_type = "craft"
    specs = (ModelSpec, FlowSpec)

    def table(self, spec: Spec) -> Table:
        rules: list[Rule] = [rule(name, name) for name in patterns(spec)]
        taps: list[Tap] = []
        for module in dict.fromkeys(_module(name) for name in patterns(spec)):
            last = module.rpartition(".")[2]
            causes = _CAUSES.get(last) or _CAUSES.get(last.rpartition("_")[2])
            if causes:
                taps.append(Tap(module, module, causes))
        return Table(rules=tuple(rules), taps=tuple(taps))

    def write_config(self, spec: Spec) -> dict[str, Any]:
        return {
            "model_type": "craft",
            "architectures": [class_of(spec)],
            "craft_format": FORMAT,
            "model": spec.model_config(),
        }

    def read_config(self, config: Mapping[str, Any]) -> Reading:
        version, model = config.get("craft_format"), config.get("model")
        if version != FORMAT or not isinstance(model, Mapping):
            raise UnknownArchitectureError(
                f"config.json has craft_format={version!r}; this version of interop reads {FORMAT}"
            )
        return Reading(read_spec(model, {}))
