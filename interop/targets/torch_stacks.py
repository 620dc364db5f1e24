"""torch-encoder, torch-decoder, torch-transformer: state dicts of plain `torch.nn` parts.

A file holds what `state_dict()` gives of a module with these attributes:

    torch-encoder, torch-decoder          torch-transformer
    token_embedding     nn.Embedding      source_embedding, target_embedding    nn.Embedding
    position_embedding  nn.Embedding      source_positions, target_positions    nn.Embedding
    encoder or decoder  nn.TransformerEncoder or nn.TransformerDecoder, with norm=nn.LayerNorm
                                          transformer                           nn.Transformer
    head                nn.Linear         head                                  nn.Linear

A sinusoidal table is an embedding here, and a tied head names the embedding again.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from craft_jax.errors import UsageError
from interop.mapping.spec import ModelSpec
from interop.mapping.table import Rule, Table, Tap, rule
from interop.mapping.tensors import Tensors, is_one
from interop.targets.base import (
    LANGUAGE_MODEL,
    Facts,
    Limit,
    Reading,
    Target,
    check_inferred,
    count_layers,
    fixed,
    need_heads,
    parallel_biases,
)
from interop.targets.rules import Layout, head, positions

ENCODER_LAYER = Layout()
DECODER_LAYER = Layout(mlp_norm="norm3")
# Settings that no shape determines, with an example for the message.
_UNKNOWN = {"norm_first": "true", "activation": '"gelu"', "embedding_scale": "false"}
FIELDS = tuple(field.name for field in dataclasses.fields(ModelSpec))
_UNKNOWN_MEMORY = {"cross_attention": '"empty"'}


class _Stack(Target):
    """Base of the three targets.

    Attributes:
      layer: the module that has the layers; its first parameters determine the sizes.
      table_name: the embedding of the predicted tokens.
      unknown: settings that no shape determines, with an example.
      ties: settings that say whether another tensor is that embedding.
    """

    container = "torch"
    layer: ClassVar[str]
    table_name: ClassVar[str] = "token_embedding"
    unknown: ClassVar[Mapping[str, str]] = _UNKNOWN
    ties: ClassVar[Mapping[str, str]] = {"tie_embeddings": "head.weight"}

    def write_config(self, spec: ModelSpec) -> dict[str, Any]:
        return dataclasses.asdict(spec)

    def contents(self, tensors: Mapping[str, Any], spec: ModelSpec, facts: Facts) -> Any:
        return tensors

    def complete_config(
        self, config: Mapping[str, Any] | None, tensors: Tensors, num_heads: int | None
    ) -> Mapping[str, Any]:
        inferred = self._inferred({name: tensor.shape for name, tensor in tensors.items()})
        given = {name: value for name, value in (config or {}).items() if value is not None}
        if num_heads is not None:
            given.setdefault("num_heads", num_heads)
        check_inferred(inferred, given)
        lacking = [name for name in self.unknown if name not in given]
        if lacking:
            heads = {} if "num_heads" in given else {"num_heads": "4"}
            wanted = heads | {name: self.unknown[name] for name in lacking}
            example = ", ".join(f'"{name}": {value}' for name, value in wanted.items())
            raise UsageError(
                f"a bare state dict does not determine {', '.join(wanted)}; give them with "
                f"`config='{{{example}}}'`, or in a file (`num_heads` can be given alone)"
            )
        need_heads(inferred["d_model"], given.get("num_heads"))
        for setting, name in self.ties.items():
            given.setdefault(setting, is_one(tensors, f"{self.table_name}.weight", name))
        return {"norm_eps": 1e-5, "dropout": 0.0, "positions": "learned"} | given | inferred

    def unknown_settings(self, config: Mapping[str, Any]) -> list[str]:
        return [name for name in config if name not in FIELDS]

    def _inferred(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """Returns the settings that follow from the shapes."""
        first = f"{self.layer}.layers.0."
        rows, width = shapes[f"{self.table_name}.weight"]
        return {
            "vocab_size": rows,
            "d_model": width,
            "d_ff": shapes[f"{first}linear1.weight"][0],
            "num_layers": count_layers(shapes, f"{self.layer}.layers."),
            "bias": f"{first}linear1.bias" in shapes,
            "head_bias": "head.bias" in shapes,
        }

    def read_config(self, config: Mapping[str, Any]) -> Reading:
        known = {n: v for n, v in config.items() if n in FIELDS and n != "name"}
        return Reading(self._spec(known))

    def _spec(self, values: Mapping[str, Any]) -> ModelSpec:
        return ModelSpec.simplest(**values)


class TorchEncoder(_Stack):
    """The state dict of embeddings, an nn.TransformerEncoder, and an nn.Linear."""

    name = "torch-encoder"
    summary = "a state dict: nn.Embedding, nn.TransformerEncoder, nn.Linear"
    anchor = "encoder.layers.0.self_attn.in_proj_weight"
    layer = "encoder"
    block = ENCODER_LAYER
    limits = (
        LANGUAGE_MODEL,
        *parallel_biases()[:1],
        Limit(
            "cross_attention",
            lambda spec: spec.cross_attention in ("none", "source"),
            "its layers have no cross-attention; torch-decoder's have",
        ),
    )

    def table(self, spec: ModelSpec) -> Table:
        ours, theirs = "blocks.{i}.", f"{self.layer}.layers.{{i}}."
        has_cross = spec.cross_attention != "none"
        embed, *above = head(spec, "token_embedding.embedding", "token_embedding.weight", "head")
        rules: list[Rule] = [
            embed,
            rule(positions(spec), "position_embedding.weight"),
            *self.block.block(ours, theirs, spec, has_cross=has_cross),
        ]
        taps = [
            Tap("token_embedding", "token_embedding", "the token embedding's rows"),
            Tap("position_embedding", "position_embedding", "the rows of positions"),
            *self.block.taps(ours, theirs, has_cross=has_cross),
        ]
        if spec.final_norm:
            final = f"{self.layer}.norm"
            rules += self.block.norm("final_norm", final, spec, spec.has_final_norm_bias)
            taps.append(Tap("final_norm", final, "epsilon, weight or bias of the last norm"))
        return Table(rules=(*rules, *above), taps=tuple(taps))

    def recognises(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        return {self.anchor, "token_embedding.weight", "position_embedding.weight"} <= set(shapes)

    def _inferred(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        has_final = f"{self.layer}.norm.weight" in shapes
        final = {"final_norm_bias": f"{self.layer}.norm.bias" in shapes} if has_final else {}
        sizes = {"max_seq_len": shapes["position_embedding.weight"][0], "final_norm": has_final}
        return super()._inferred(shapes) | sizes | final


class TorchDecoder(TorchEncoder):
    """The state dict of embeddings, an nn.TransformerDecoder, and an nn.Linear."""

    name = "torch-decoder"
    summary = "a state dict: nn.Embedding, nn.TransformerDecoder, nn.Linear"
    anchor = "decoder.layers.0.multihead_attn.in_proj_weight"
    layer = "decoder"
    block = dataclasses.replace(DECODER_LAYER, demands_cross=True)
    unknown = _UNKNOWN | _UNKNOWN_MEMORY
    limits = (
        LANGUAGE_MODEL,
        *parallel_biases()[:1],
        Limit(
            "cross_attention",
            lambda spec: spec.cross_attention != "none" or spec.norm_first,
            "its layers have cross-attention and a layer norm after it, which cannot do nothing",
        ),
    )


class TorchTransformer(_Stack):
    """The state dict of embeddings, an nn.Transformer, and an nn.Linear."""

    name = "torch-transformer"
    summary = "a state dict: nn.Embedding, nn.Transformer, nn.Linear"
    anchor = "transformer.encoder.layers.0.self_attn.in_proj_weight"
    layer = "transformer.encoder"
    table_name = "target_embedding"
    ties = {"tie_embeddings": "head.weight", "share_embeddings": "source_embedding.weight"}
    limits = (fixed("cross_attention", "source", "it is an encoder with a decoder beside it"),)

    def table(self, spec: ModelSpec) -> Table:
        parts = (
            ("encoder.{i}.", "transformer.encoder.layers.{i}.", ENCODER_LAYER, False),
            ("decoder.{j}.", "transformer.decoder.layers.{j}.", DECODER_LAYER, True),
        )
        target = "target_embedding.weight"
        both = (target, "source_embedding.weight")
        shared = both if spec.share_embeddings else (target,)
        embed, *above = head(spec, "target_embedding.embedding", shared, "head")
        rules: list[Rule] = [embed]
        if not spec.share_embeddings:
            rules.append(rule("source_embedding.embedding", "source_embedding.weight"))
        taps: list[Tap] = []
        for side in ("source", "target"):
            name = f"{side}_positions"
            rules.append(rule(positions(spec, name), f"{name}.weight"))
            taps.append(Tap(name, name, "the rows of positions"))
        for ours, theirs, layer, has_cross in parts:
            stack = ours.partition(".")[0]
            rules += layer.block(ours, theirs, spec, has_cross=has_cross)
            taps += layer.taps(ours, theirs, has_cross=has_cross)
            final = f"transformer.{stack}.norm"
            rules += layer.norm(f"{stack}_norm", final, spec, spec.has_final_norm_bias)
            taps.append(Tap(f"{stack}_norm", final, "epsilon, weight or bias of the last norm"))
        return Table(rules=(*rules, *above), taps=tuple(taps))

    def recognises(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        return {self.anchor, "target_embedding.weight", "target_positions.weight"} <= set(shapes)

    def _inferred(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        return super()._inferred(shapes) | {
            "num_decoder_layers": count_layers(shapes, "transformer.decoder.layers."),
            "max_seq_len": shapes["target_positions.weight"][0],
        }

    def _spec(self, values: Mapping[str, Any]) -> ModelSpec:
        return ModelSpec(**(dict(values) | {"name": "seq2seq", "cross_attention": "source"}))
