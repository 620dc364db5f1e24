"""What a model is, apart from its weights: the attributes that a target must be able to express.

`ModelSpec` comes from the `model` section of a craft_jax config, or from a target's own config, and
goes into either. It carries every attribute that changes a number, and nothing else.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from interop.errors import NotRepresentableError, UnknownArchitectureError

FAMILIES = ("gpt",)
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """The semantics of a decoder of pre-norm blocks; the names are those of `GPTConfig`.

    Attributes:
      name: the family in craft_jax's registry of models.
      vocab_size: rows of the token embedding, with those that only pad it.
      num_layers, num_heads, d_model, d_ff, max_seq_len: sizes.
      dropout: while training.
      activation: one of `ACTIVATIONS`; gelu is the exact one.
      bias: whether dense layers and layer norms have biases.
      tie_embeddings: whether the head is the token embedding.
      norm_eps: epsilon of the layer norms.
    """

    name: str = "gpt"
    vocab_size: int
    num_layers: int
    num_heads: int
    d_model: int
    d_ff: int
    max_seq_len: int
    dropout: float = 0.0
    activation: str
    bias: bool
    tie_embeddings: bool
    norm_eps: float

    def __post_init__(self):
        problems = [
            f"{field}={getattr(self, field)!r} is not a whole number above 0"
            for field in ("vocab_size", "num_layers", "num_heads", "d_model", "d_ff", "max_seq_len")
            if not _is_positive_int(getattr(self, field))
        ]
        if not problems and self.d_model % self.num_heads:
            problems.append(f"num_heads={self.num_heads} does not divide d_model={self.d_model}")
        if self.activation not in ACTIVATIONS:
            problems.append(
                f"activation={self.activation!r} is not one of {', '.join(ACTIVATIONS)}"
            )
        if not (isinstance(self.norm_eps, (int, float)) and self.norm_eps > 0):
            problems.append(f"norm_eps={self.norm_eps!r} is not above 0")
        if not (isinstance(self.dropout, (int, float)) and 0 <= self.dropout < 1):
            problems.append(f"dropout={self.dropout!r} is not in [0, 1)")
        if problems:
            raise UnknownArchitectureError(
                f"this is not a model of craft_jax: {'; '.join(problems)}", problems=problems
            )

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
                f"model.name={name}: interop knows {', '.join(FAMILIES)}; a model of your own "
                "needs a table of its own, see docs/interop.md"
            )
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(model) - known):
            raise NotRepresentableError(
                f"model.{unknown[0]}={model[unknown[0]]!r} is a setting that this version of "
                "interop does not know, so nothing is exported; use the version that wrote the run"
            )
        if lacking := sorted(known - set(model)):
            raise NotRepresentableError(f"the saved config lacks model.{', model.'.join(lacking)}")
        values = dict(model)
        values["vocab_size"] = max(values["vocab_size"] or 0, vocab_size)
        values["d_ff"] = values["d_ff"] or 4 * values["d_model"]
        return cls(**values)

    def model_config(self) -> dict[str, Any]:
        """Returns the `model` section of a config."""
        return dataclasses.asdict(self)

    def differences(self, other: "ModelSpec") -> list[str]:
        """Returns one line for each attribute that differs and changes numbers."""
        return [
            f"{field.name} is {getattr(self, field.name)!r} and {getattr(other, field.name)!r}"
            for field in dataclasses.fields(self)
            if field.name != "dropout" and getattr(self, field.name) != getattr(other, field.name)
        ]


def _is_positive_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
