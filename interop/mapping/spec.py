"""The architecture of a model: the attributes that a target must be able to express.

A spec comes from the `model` section of a craft_jax config, or from a target's own config, and goes
into either. It carries every attribute that changes a number, and nothing else: `ModelSpec` those
of models of tokens, `FlowSpec` those of a flow.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, ClassVar, NamedTuple

from interop.errors import NotRepresentableError, UnknownArchitectureError

ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")
POSITIONS = ("learned", "sinusoidal")
CROSS_ATTENTION = ("none", "zeros", "empty", "source")
TIMES = ("uniform", "logit_normal")


class Family(NamedTuple):
    """A model of craft_jax, as its config describes it.

    Attributes:
      fixed: attributes of `ModelSpec` that are no choice of this family, and so not in its config.
      added: fields that its config has not always had, and what their absence means.
    """

    fixed: Mapping[str, Any]
    added: Mapping[str, Any] = {}

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of its config."""
        names = (field.name for field in dataclasses.fields(ModelSpec))
        return tuple(name for name in names if name not in self.fixed)


FAMILIES: dict[str, Family] = {
    "gpt": Family(
        fixed={
            "num_decoder_layers": 0,
            "norm_first": True,
            "final_norm": True,
            "positions": "learned",
            "embedding_scale": False,
            "cross_attention": "none",
            "share_embeddings": False,
            "final_norm_bias": None,
        },
        added={"norm_bias": None, "head_bias": False},
    ),
    "transformer": Family(fixed={"num_decoder_layers": 0, "share_embeddings": False}),
    "seq2seq": Family(
        fixed={
            "final_norm": True,
            "cross_attention": "source",
            "norm_bias": None,
            "final_norm_bias": None,
        },
    ),
}
"""By the name in craft_jax's registry of models."""


class Spec:
    """Methods of all specs."""

    is_of_tokens: ClassVar[bool]
    same_numbers: ClassVar[tuple[str, ...]]
    """Fields that change no number that a trained model computes."""

    def differences(self, other: "Spec") -> list[str]:
        """Returns one line for each attribute that differs and changes numbers."""
        if self.is_of_tokens != other.is_of_tokens:
            return [f"one is a {self.name} and the other a {other.name}"]
        return [
            f"{field.name} is {getattr(self, field.name)!r} and {getattr(other, field.name)!r}"
            for field in dataclasses.fields(self)
            if field.name not in self.same_numbers
            and getattr(self, field.name) != getattr(other, field.name)
        ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSpec(Spec):
    """The semantics of a model of tokens; the names are those of craft_jax's configs.

    Attributes:
      name: the family in craft_jax's registry of models.
      vocab_size: rows of each token embedding, with those that only pad it.
      num_layers: blocks; of the encoder, if there is a decoder beside it.
      num_decoder_layers: blocks of the decoder; 0 for a language model.
      num_heads, d_model, d_ff, max_seq_len: sizes.
      dropout: while training.
      activation: one of `ACTIVATIONS`; gelu is the exact one.
      bias: whether dense layers have biases.
      norm_bias: whether the layer norms of the blocks have; always None where that is `bias`.
      final_norm: whether a layer norm follows the last block.
      final_norm_bias: whether that one has a bias; always None where the others have the same.
      norm_first: layer norms before attention and MLP, not after the sums.
      norm_eps: epsilon of the layer norms.
      positions: one of `POSITIONS`.
      embedding_scale: whether embedded tokens are multiplied by the root of `d_model`.
      cross_attention: to nothing, to one zero vector, to a memory of length 0, or to a source.
      tie_embeddings: whether the head is the embedding of what it predicts.
      share_embeddings: whether source and target have one embedding.
      head_bias: whether the head has a bias.
    """

    is_of_tokens: ClassVar[bool] = True
    # The family changes none: a gpt is a transformer whose choices are made.
    same_numbers: ClassVar[tuple[str, ...]] = ("name", "dropout")

    name: str = "gpt"
    vocab_size: int
    num_layers: int
    num_decoder_layers: int = 0
    num_heads: int
    d_model: int
    d_ff: int
    max_seq_len: int
    dropout: float = 0.0
    activation: str
    bias: bool
    norm_bias: bool | None = None
    norm_first: bool = True
    norm_eps: float
    final_norm: bool = True
    final_norm_bias: bool | None = None
    positions: str = "learned"
    embedding_scale: bool = False
    cross_attention: str = "none"
    tie_embeddings: bool
    share_embeddings: bool = False
    head_bias: bool = False

    def __post_init__(self):
        # One way to say it, so that equal models have equal specs.
        if self.norm_bias == self.bias:
            object.__setattr__(self, "norm_bias", None)
        if not self.final_norm or self.final_norm_bias == self.has_norm_bias:
            object.__setattr__(self, "final_norm_bias", None)
        if problems := [*self._impossible(), *self._not_of_the_family()]:
            raise UnknownArchitectureError(
                f"this is not a model of craft_jax: {'; '.join(problems)}", problems=problems
            )

    @property
    def has_norm_bias(self) -> bool:
        """Returns whether the layer norms of the blocks have biases."""
        return self.bias if self.norm_bias is None else self.norm_bias

    @property
    def has_final_norm_bias(self) -> bool:
        """Returns whether the last layer norm has a bias."""
        return self.has_norm_bias if self.final_norm_bias is None else self.final_norm_bias

    def _impossible(self) -> list[str]:
        sizes = ("vocab_size", "num_layers", "num_heads", "d_model", "d_ff", "max_seq_len")
        problems = [
            f"{field}={getattr(self, field)!r} is not a whole number above 0"
            for field in sizes
            if not _is_positive_int(getattr(self, field))
        ]
        if not problems and self.d_model % self.num_heads:
            problems.append(f"num_heads={self.num_heads} does not divide d_model={self.d_model}")
        for field, choices in (
            ("activation", ACTIVATIONS),
            ("positions", POSITIONS),
            ("cross_attention", CROSS_ATTENTION),
        ):
            if getattr(self, field) not in choices:
                value = getattr(self, field)
                problems.append(f"{field}={value!r} is not one of {', '.join(choices)}")
        if not (isinstance(self.norm_eps, (int, float)) and self.norm_eps > 0):
            problems.append(f"norm_eps={self.norm_eps!r} is not above 0")
        if not (isinstance(self.dropout, (int, float)) and 0 <= self.dropout < 1):
            problems.append(f"dropout={self.dropout!r} is not in [0, 1)")
        flags = (
            "bias norm_first final_norm embedding_scale tie_embeddings share_embeddings head_bias"
        )
        values = {flag: getattr(self, flag) for flag in flags.split()}
        values |= {flag: getattr(self, f"has_{flag}") for flag in ("norm_bias", "final_norm_bias")}
        problems += [
            f"{flag}={value!r} is not true or false"
            for flag, value in values.items()
            if not isinstance(value, bool)
        ]
        return problems

    def _not_of_the_family(self) -> list[str]:
        if self.name not in FAMILIES:
            return [f"name={self.name!r} is not one of {', '.join(FAMILIES)}"]
        problems = [
            f"{field}={getattr(self, field)!r}, which {self.name} cannot have"
            for field, value in FAMILIES[self.name].fixed.items()
            if getattr(self, field) != value
        ]
        if self.name == "seq2seq" and not _is_positive_int(self.num_decoder_layers):
            problems.append(f"num_decoder_layers={self.num_decoder_layers!r} is not above 0")
        if self.name != "seq2seq" and self.cross_attention == "source":
            problems.append(f"cross_attention='source', which {self.name} cannot have")
        return problems

    @classmethod
    def simplest(cls, **attributes: Any) -> "ModelSpec":
        """Returns the spec of a language model, in the first family that can be it: gpt, if so."""
        for name in ("gpt", "transformer"):
            try:
                return cls(name=name, **attributes)
            except UnknownArchitectureError:
                if name == "transformer":
                    raise
        raise AssertionError

    @classmethod
    def from_model_config(cls, model: Mapping[str, Any], vocab_size: int) -> "ModelSpec":
        """Reads the `model` section of a saved config.

        Args:
          model: the section.
          vocab_size: rows of the embedding where the section leaves that to the tokenizer.

        Raises:
          NotRepresentableError: a model of the user's own, or a field that is not known here.
        """
        name = model.get("name")
        if name not in FAMILIES:
            raise NotRepresentableError(
                f"model.name={name}: interop knows {', '.join(FAMILIES)} and flow; a model of your "
                "own needs a table of its own, see docs/interop.md"
            )
        family = FAMILIES[name]
        _check_fields(model, family.fields, set(family.fields) - set(family.added))
        values = {**family.fixed, **family.added, **model}
        values["vocab_size"] = max(values["vocab_size"] or 0, vocab_size)
        values["d_ff"] = values["d_ff"] or 4 * values["d_model"]
        return cls(**values)

    def model_config(self) -> dict[str, Any]:
        """Returns the `model` section of a config."""
        return {field: getattr(self, field) for field in FAMILIES[self.name].fields}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowSpec(Spec):
    """The semantics of a flow; the names are those of craft_jax's configs.

    Attributes:
      name: flow.
      height, width, channels, num_classes: of the images.
      patch_size, num_layers, num_heads, d_model, d_ff: sizes.
      dropout, label_dropout, times: how it is trained.
    """

    is_of_tokens: ClassVar[bool] = False
    same_numbers: ClassVar[tuple[str, ...]] = ("dropout", "label_dropout", "times")
    # What only models of tokens have.
    vocab_size: ClassVar[int] = 0
    num_decoder_layers: ClassVar[int] = 0
    cross_attention: ClassVar[str] = "none"
    embedding_scale: ClassVar[bool] = False

    name: str = "flow"
    height: int
    width: int
    channels: int
    num_classes: int
    patch_size: int
    num_layers: int
    num_heads: int
    d_model: int
    d_ff: int
    dropout: float
    label_dropout: float
    times: str

    def __post_init__(self):
        sizes = "height width channels patch_size num_layers num_heads d_model d_ff".split()
        problems = [
            f"{field}={getattr(self, field)!r} is not a whole number above 0"
            for field in sizes
            if not _is_positive_int(getattr(self, field))
        ]
        if not (self.num_classes == 0 or _is_positive_int(self.num_classes)):
            problems.append(f"num_classes={self.num_classes!r} is not a whole number from 0")
        for field, part in (
            ("d_model", "num_heads"),
            ("height", "patch_size"),
            ("width", "patch_size"),
        ):
            if not problems and getattr(self, field) % getattr(self, part):
                problems.append(
                    f"{part}={getattr(self, part)} does not divide {field}={getattr(self, field)}"
                )
        for field in ("dropout", "label_dropout"):
            rate = getattr(self, field)
            if not (isinstance(rate, (int, float)) and 0 <= rate < 1):
                problems.append(f"{field}={rate!r} is not in [0, 1)")
        if self.times not in TIMES:
            problems.append(f"times={self.times!r} is not one of {', '.join(TIMES)}")
        if self.name != "flow":
            problems.append(f"name={self.name!r} is not flow")
        if problems:
            raise UnknownArchitectureError(
                f"this is not a model of craft_jax: {'; '.join(problems)}", problems=problems
            )

    @property
    def num_patches(self) -> int:
        """How many patches an image has."""
        return self.height // self.patch_size * (self.width // self.patch_size)

    @property
    def patch_width(self) -> int:
        """How many numbers a patch has."""
        return self.patch_size**2 * self.channels

    @classmethod
    def from_model_config(cls, model: Mapping[str, Any], sizes: Mapping[str, int]) -> "FlowSpec":
        """Reads the `model` section of a saved config.

        Args:
          model: the section.
          sizes: of the images, where the section leaves them to the data.

        Raises:
          NotRepresentableError: a field that is not known here, or one that is missing.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        _check_fields(model, known, known)
        values = {n: sizes.get(n) if value is None else value for n, value in model.items()}
        values["d_ff"] = values["d_ff"] or 4 * values["d_model"]
        return cls(**values)

    def model_config(self) -> dict[str, Any]:
        """Returns the `model` section of a config."""
        return dataclasses.asdict(self)


def read_spec(model: Mapping[str, Any], sizes: Mapping[str, int | None]) -> Spec:
    """Reads the `model` section of a saved config.

    Args:
      model: the section.
      sizes: what the section leaves to the data: `vocab_size`, or those of images.

    Raises:
      NotRepresentableError: see `ModelSpec.from_model_config`.
    """
    if model.get("name") == "flow":
        return FlowSpec.from_model_config(model, sizes)
    return ModelSpec.from_model_config(model, sizes.get("vocab_size") or 0)


def _check_fields(model: Mapping[str, Any], known: Collection[str], needed: Collection[str]):
    if unknown := sorted(set(model) - set(known)):
        raise NotRepresentableError(
            f"model.{unknown[0]}={model[unknown[0]]!r} is a setting that this version of interop "
            "does not know, so nothing is exported; use the version that wrote the run"
        )
    if lacking := sorted(set(needed) - set(model)):
        raise NotRepresentableError(f"the saved config lacks model.{', model.'.join(lacking)}")


def _is_positive_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
