"""craft-torch: a folder with one torch-only file, `modeling_craft.py`, that has every feature.

Its parameters have the paths and layouts of craft_jax, so its table renames nothing.
"""

from collections.abc import Mapping
from typing import Any

from interop.errors import UnknownArchitectureError
from interop.leaves import patterns
from interop.mapping import Rule, Table, Tap, rule
from interop.spec import ModelSpec
from interop.targets.base import Reading, Target

FORMAT = 1
"""Version of config.json; `modeling_craft.py` refuses later ones."""


class CraftTorch(Target):
    """One torch-only file with every feature of craft_jax, and safetensors."""

    name = "craft-torch"
    summary = "one torch-only file with every feature of craft_jax, and safetensors"
    container = "craft-torch"
    anchor = "token_embedding.embedding"
    model_type = "craft"

    def table(self, spec: ModelSpec) -> Table:
        rules: list[Rule] = [rule(name, name) for name in patterns(spec)]
        same = [
            ("token_embedding", "the token embedding's rows"),
            ("position_embedding", "the position embedding's rows"),
            ("blocks.{i}.attn_norm", "epsilon, scale or bias of the layer norm"),
            ("blocks.{i}.attn", "the heads, or a kernel of query, key, value or out"),
            ("blocks.{i}.mlp_norm", "epsilon, scale or bias of the layer norm"),
            ("blocks.{i}.mlp", "the activation, or a kernel of up or down"),
            ("final_norm", "epsilon, scale or bias of the final layer norm"),
        ]
        return Table(rules=tuple(rules), taps=tuple(Tap(n, n, causes) for n, causes in same))

    def write_config(self, spec: ModelSpec) -> dict[str, Any]:
        return {
            "model_type": "craft",
            "architectures": ["CraftForCausalLM"],
            "craft_format": FORMAT,
            "model": spec.model_config(),
        }

    def read_config(self, config: Mapping[str, Any]) -> Reading:
        version, model = config.get("craft_format"), config.get("model")
        if version != FORMAT or not isinstance(model, Mapping):
            raise UnknownArchitectureError(
                f"config.json has craft_format={version!r}; this version of interop reads {FORMAT}"
            )
        return Reading(ModelSpec.from_model_config(model, 0))
