"""craft-b to craft-f: the models of the original PyTorch Craft, each generation under its names.

    craft-e  its last model: torch.nn.TransformerEncoderLayer, embedded tokens times sqrt(d_model)
    craft-f  before that: torch.nn.TransformerDecoder, whose memory has length zero
    craft-d  the GPT decoder of its own: no factor, an untied head with a bias
    craft-d0 the same, under the names of its first weeks
    craft-c  torch.nn.TransformerDecoder, whose memory is one zero vector
    craft-b  the first: torch.nn.TransformerEncoder, positions learned or sinusoidal

A file is a checkpoint as Craft's trainer saves it. The settings of the model are in one of several
places; sizes come from the tensors.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np

from interop.errors import CorruptFileError, UnknownArchitectureError
from interop.mapping.ops import SinusoidBuffer
from interop.mapping.spec import ModelSpec
from interop.mapping.table import Buffer, Rule, Table, Tap, rule
from interop.mapping.tensors import Tensors
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
from interop.targets.torch_stacks import DECODER_LAYER, ENCODER_LAYER

# Craft's names of settings, those of its first checkpoints included, and ours.
SETTINGS = {
    "vocab_size": "vocab_size",
    "d_model": "d_model",
    "n_embd": "d_model",
    "n_head": "num_heads",
    "d_hid": "d_ff",
    "n_layers": "num_layers",
    "n_layer": "num_layers",
    "dropout": "dropout",
    "max_seq_length": "max_seq_len",
    "block_size": "max_seq_len",
    "layer_norm_eps": "norm_eps",
    "activation": "activation",
    "bias": "bias",
    "norm_first": "norm_first",
}
_NO_SETTINGS = ("_target_", "model_type", "architecture", "pos_encoding_type")
_DEFAULTS = {"dropout": 0.1, "norm_eps": 1e-5, "activation": "gelu", "norm_first": True}
"""Defaults of Craft's own code."""

_PLACES = (
    ("model_config",),
    ("experiment", "model"),
    ("config", "experiment", "model"),
    ("config", "model"),
    ("config", "model_config"),
    ("config", "architecture"),
    ("config",),
    ("model",),
    ("args",),
    (),
)


def settings_in(around: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the settings of a model, by Craft's names, that a checkpoint holds; None for none.

    Args:
      around: the checkpoint, as plain data.
    """
    for place in _PLACES:
        found: Any = around
        for name in place:
            found = found.get(name) if isinstance(found, Mapping) else None
        for settings in _nested(found):
            if any(name in settings for name in ("n_head", "d_model", "n_embd")):
                return dict(settings)
    return None


def _nested(value: Any) -> Iterator[Mapping[str, Any]]:
    """Yields a section and, better, the `config` inside of it."""
    if isinstance(value, Mapping):
        yield from _nested(value.get("config"))
        yield value


def _number(value: Any) -> Any:
    """Converts numbers that YAML reads as text, such as 1e-5; returns other values unchanged."""
    if isinstance(value, str):
        for kind in (int, float):
            with contextlib.suppress(ValueError):
                return kind(value)
    return value


def is_additive_mask(array: np.ndarray) -> bool:
    """Returns whether an array (n, n) is 0 up to the diagonal and -inf above it."""
    if array.ndim != 2 or array.shape[0] != array.shape[1]:
        return False
    n = len(array)
    return all(
        not np.any(row[: i + 1]) and bool(np.all(np.isneginf(row[i + 1 :].astype(np.float64))))
        for i, row in zip(range(n), array, strict=True)
    )


def _is_counting(array: np.ndarray) -> bool:
    return array.ndim == 2 and len(array) == 1 and np.array_equal(array[0], np.arange(array.size))


class _Lineage(Target):
    """Base of all generations.

    Attributes:
      path: of its class, as Craft's configs name it.
      architecture: as Craft's configs name it.
      stack: the modules that hold the layers.
      block: how a layer names its parts.
      embedding, final, head: the other modules.
      has: attributes of every model of this generation.
    """

    container = "craft"
    path: ClassVar[str] = "craft.models.transformer.TransformerModel"
    architecture: ClassVar[str] = "transformer"
    stack: ClassVar[str]
    block: ClassVar[Layout]
    embedding: ClassVar[str] = "token_embedding"
    final: ClassVar[str]
    head: ClassVar[str]
    has: ClassVar[Mapping[str, Any]]

    def table(self, spec: ModelSpec) -> Table:
        ours, theirs = "blocks.{i}.", f"{self.stack}.{{i}}."
        has_cross = spec.cross_attention != "none"
        embed, *above = head(
            spec, "token_embedding.embedding", f"{self.embedding}.weight", self.head
        )
        rules: list[Rule] = [
            embed,
            *self._positions(spec),
            *self.block.block(ours, theirs, spec, has_cross=has_cross),
            *self.block.norm("final_norm", self.final, spec, spec.has_final_norm_bias),
        ]
        taps = (
            Tap("token_embedding", self.embedding, "the token embedding's rows"),
            *self.block.taps(ours, theirs, has_cross=has_cross),
            Tap("final_norm", self.final, "epsilon, weight or bias of the last layer norm"),
        )
        return Table(rules=(*rules, *above), buffers=self._buffers(spec), taps=taps)

    def _positions(self, spec: ModelSpec) -> list[Rule]:
        return [rule(positions(spec), "position_embedding.weight")]

    def _buffers(self, spec: ModelSpec) -> tuple[Buffer, ...]:
        return ()

    def write_config(self, spec: ModelSpec) -> dict[str, Any]:
        """Returns the settings by Craft's names."""
        return {
            "_target_": self.path,
            "model_type": "language",
            "architecture": self.architecture,
            "vocab_size": spec.vocab_size,
            "max_seq_length": spec.max_seq_len,
            "d_model": spec.d_model,
            "n_head": spec.num_heads,
            "d_hid": spec.d_ff,
            "n_layers": spec.num_layers,
            "dropout": spec.dropout,
            "bias": spec.bias,
            "layer_norm_eps": spec.norm_eps,
            "activation": spec.activation,
            "norm_first": spec.norm_first,
        }

    def contents(self, tensors: Mapping[str, Any], spec: ModelSpec, facts: Facts) -> Any:
        settings = self.write_config(spec)
        found = {
            "epoch": 0,
            "global_step": facts.step,
            "model_state_dict": tensors,
            "optimizer_state_dict": None,
            "scheduler_state_dict": None,
            "scaler_state_dict": None,
            "best_val_metric": facts.val_loss,
            "metrics": None,
            "config": {"experiment": {"model": settings}},
            "tensorboard_log_dir": None,
            "callbacks_state": None,
            "model_config": settings,
        }
        if facts.vocabulary is not None:
            vocabulary = dict(facts.vocabulary)
            found["char_to_idx"] = vocabulary
            found["idx_to_char"] = {index: text for text, index in vocabulary.items()}
            found["special_tokens"] = dict(facts.special_tokens)
        return found

    def config_in(self, around: Mapping[str, Any]) -> Mapping[str, Any] | None:
        return settings_in(around)

    def complete_config(
        self, config: Mapping[str, Any] | None, tensors: Tensors, num_heads: int | None
    ) -> Mapping[str, Any]:
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        inferred = self._inferred(shapes)
        given = {}
        for theirs, ours in SETTINGS.items():
            value = (config or {}).get(theirs)
            # Ignores unresolved interpolations.
            if value is not None and not (isinstance(value, str) and value.startswith("${")):
                given.setdefault(ours, _number(value))
        if num_heads is not None:
            given.setdefault("num_heads", num_heads)
        # The table of positions is right where the config has another length.
        check_inferred(
            {n: v for n, v in inferred.items() if n not in ("max_seq_len", "bias")}, given
        )
        need_heads(inferred["d_model"], given.get("num_heads"))
        if given.get("bias", inferred["bias"]) != inferred["bias"]:
            raise CorruptFileError(f"bias is {given['bias']} by the config, and not by the tensors")
        return _DEFAULTS | given | inferred

    def unknown_settings(self, config: Mapping[str, Any]) -> list[str]:
        known = {*SETTINGS, *_NO_SETTINGS, "config", "experiment", "model"}
        return [name for name in config if name not in known]

    def _inferred(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """Returns the settings that follow from the shapes, by our names."""
        first = f"{self.stack}.0."
        rows, width = shapes[f"{self.embedding}.weight"]
        return {
            "vocab_size": rows,
            "d_model": width,
            "d_ff": shapes[f"{first}{self.block.up}.weight"][0],
            "num_layers": count_layers(shapes, f"{self.stack}."),
            "max_seq_len": self._num_positions(shapes),
            "bias": f"{first}{self.block.up}.bias" in shapes,
        }

    def _num_positions(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        return shapes["position_embedding.weight"][0]

    def read_config(self, config: Mapping[str, Any]) -> Reading:
        if config["activation"] not in ("gelu", "relu"):
            raise UnknownArchitectureError(
                f"its config has activation={config['activation']!r}; Craft's own models have gelu "
                "or relu"
            )
        return Reading(ModelSpec.simplest(**(dict(config) | self._fixed(config))))

    def _fixed(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the attributes that the generation fixes, whatever its config."""
        return dict(self.has)

    def recognises(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        return {self.anchor, f"{self.embedding}.weight", f"{self.final}.weight"} <= set(shapes)


def _limits(has: Mapping[str, Any], *more: Limit) -> tuple[Limit, ...]:
    """Returns the limits of a generation whose models all have these attributes."""
    words = {True: "always so", False: "never so"}
    return (
        LANGUAGE_MODEL,
        *(
            fixed(name, value, f"in this generation of Craft it is {words.get(value, value)}")
            for name, value in has.items()
        ),
        Limit(
            "activation",
            lambda spec: spec.activation in ("gelu", "relu"),
            "Craft has gelu (exact) and relu",
        ),
        *more,
    )


class CraftE(_Lineage):
    """Craft's last model, a stack of nn.TransformerEncoderLayer."""

    name = "craft-e"
    summary = "a checkpoint of Craft: its last TransformerModel (encoder layers, tied, scaled)"
    anchor = "transformer_layers.0.self_attn.in_proj_weight"
    stack, block = "transformer_layers", ENCODER_LAYER
    final, head = "layer_norm", "output_head"
    has = {
        "cross_attention": "none",
        "positions": "learned",
        "embedding_scale": True,
        "tie_embeddings": True,
        "head_bias": False,
        "final_norm": True,
    }
    limits = _limits(has, *parallel_biases())


class CraftF(_Lineage):
    """The model of Craft's architecture document: nn.TransformerDecoder with an empty memory."""

    name = "craft-f"
    summary = "a checkpoint of Craft: nn.TransformerDecoder with an empty memory"
    path = "src.models.transformer.TransformerModel"
    anchor = "transformer_decoder.layers.0.multihead_attn.in_proj_weight"
    stack, block = "transformer_decoder.layers", DECODER_LAYER
    final, head = "transformer_decoder.norm", "output_layer"
    has = {
        "cross_attention": "empty",
        "positions": "learned",
        "embedding_scale": True,
        "tie_embeddings": False,
        "head_bias": False,
        "final_norm": True,
    }
    limits = _limits(has, *parallel_biases(final=True))

    def recognises(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        return super().recognises(shapes) and "output_layer.bias" not in shapes

    def _fixed(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return {**self.has, "final_norm_bias": True}


class CraftC(CraftF):
    """nn.TransformerDecoder with a memory of one zero vector."""

    name = "craft-c"
    summary = "a checkpoint of Craft: nn.TransformerDecoder with a memory of zeros"
    has = {
        "cross_attention": "zeros",
        "positions": "learned",
        "embedding_scale": False,
        "tie_embeddings": False,
        "head_bias": True,
        "norm_first": True,
        "final_norm": True,
    }
    limits = _limits(has, *parallel_biases(final=True))

    def recognises(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        return _Lineage.recognises(self, shapes) and "output_layer.bias" in shapes


class CraftD(_Lineage):
    """Craft's GPTDecoder: query, key and value apart, an untied head."""

    name = "craft-d"
    summary = "a checkpoint of Craft: its GPTDecoder (untied head, with a bias)"
    path = "src.models.gpt_decoder.GPTDecoder"
    architecture = "gpt"
    anchor = "layers.0.self_attn.query.weight"
    stack = "layers"
    block = Layout(up="ff.fc1", down="ff.fc2", projections=("query", "key", "value"))
    final, head = "ln_f", "out_proj"
    has = {
        "cross_attention": "none",
        "positions": "learned",
        "embedding_scale": False,
        "tie_embeddings": False,
        "norm_first": True,
        "final_norm": True,
    }
    limits = _limits(has, *parallel_biases(blocks=True, final=True))

    def _buffers(self, spec: ModelSpec) -> tuple[Buffer, ...]:
        what = "a causal mask of 0 and -inf"
        return (Buffer("layers.{i}.self_attn.causal_mask", is_additive_mask, what),)

    def _inferred(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        return super()._inferred(shapes) | {"head_bias": f"{self.head}.bias" in shapes}

    def _fixed(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return {**self.has, "norm_bias": True}


class CraftD0(CraftD):
    """The GPTDecoder of Craft's first weeks: the same numbers under two other names."""

    name = "craft-d0"
    summary = "a checkpoint of Craft: the GPTDecoder of its first weeks"
    final, head = "norm", "output_layer"


class CraftB(_Lineage):
    """Craft's first model: nn.TransformerEncoder, positions learned or sinusoidal."""

    name = "craft-b"
    summary = "a checkpoint of Craft: its first TransformerModel (nn.TransformerEncoder)"
    path = "chatgot.models.transformer.TransformerModel"
    anchor = "transformer_encoder.layers.0.self_attn.in_proj_weight"
    stack, block = "transformer_encoder.layers", ENCODER_LAYER
    embedding, final, head = "embedding", "transformer_encoder.norm", "decoder"
    has = {
        "cross_attention": "none",
        "embedding_scale": True,
        "tie_embeddings": False,
        "head_bias": True,
        "norm_first": True,
        "final_norm": True,
        "activation": "gelu",
        "bias": True,
    }
    limits = _limits(has, *parallel_biases())
    _learned: ClassVar[str] = "positional_encoding.position_embeddings.weight"
    _sinusoids: ClassVar[str] = "positional_encoding.pe"

    def _positions(self, spec: ModelSpec) -> list[Rule]:
        if spec.positions == "sinusoidal":
            return [rule(positions(spec), self._sinusoids, SinusoidBuffer())]
        return [rule(positions(spec), self._learned)]

    def _buffers(self, spec: ModelSpec) -> tuple[Buffer, ...]:
        if spec.positions == "sinusoidal":
            return ()
        return (Buffer("positional_encoding.position_ids", _is_counting, "0, 1, 2, ..."),)

    def write_config(self, spec: ModelSpec) -> dict[str, Any]:
        return super().write_config(spec) | {"pos_encoding_type": spec.positions}

    def _inferred(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        kind = "learned" if self._learned in shapes else "sinusoidal"
        return super()._inferred(shapes) | {"positions": kind}

    def _num_positions(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        return shapes[self._learned][0] if self._learned in shapes else shapes[self._sinusoids][1]


LINEAGES: tuple[_Lineage, ...] = (
    CraftE(),
    CraftF(),
    CraftD(),
    CraftC(),
    CraftB(),
    CraftD0(),
)
"""The latest generation first: `target=craft` takes the first that holds the model."""
