"""Targets: a table of names, the limits of the models it can hold, and a config of its own.

A target's file defines one subclass of `Target`; nothing else of the project knows its names.
"""

import abc
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

from craft_jax.errors import UsageError
from interop.errors import CorruptFileError, NotRepresentableError
from interop.mapping import table as mapping
from interop.mapping.spec import ModelSpec, Spec
from interop.mapping.table import Table
from interop.mapping.tensors import Tensors, same_bits

Container = Literal["hf", "craft-torch", "nanogpt", "torch", "craft"]
FILES = ("nanogpt", "torch", "craft")
"""The containers that are one file; the others are folders."""

APPROXIMATIONS = {
    "gelu": "another form of GELU",
    "eps": "another epsilon in the layer norms",
    "dropout": "one rate of dropout in place of several; changes training only",
    "upcast": "attention in the dtype of its operands",
    "config": "settings that mean nothing here are dropped",
    "scale-fold": "the factor on embedded tokens multiplied into their table",
    "cross-fold": "cross-attention to nothing, which adds a constant, folded into a bias",
}
"""The names that `allow_approx` takes, and what each changes."""


@dataclasses.dataclass(frozen=True)
class Limit:
    """A limit of the models that a target can hold.

    Attributes:
      attribute: of `ModelSpec`.
      holds: whether a spec is within the limit.
      reason: the property of the target that sets the limit.
      approx: the name by which `allow_approx` may cross it; None where nothing can.
      becomes: returns the spec after crossing it.
    """

    attribute: str
    holds: Callable[[ModelSpec], bool]
    reason: str
    approx: str | None = None
    becomes: Callable[[ModelSpec], ModelSpec] = lambda spec: spec


def fixed(attribute: str, value: Any, reason: str) -> Limit:
    """Returns the limit that an attribute has one value."""
    return Limit(attribute, lambda spec: getattr(spec, attribute) == value, reason)


_OF_TOKENS = Limit("name", lambda spec: spec.is_of_tokens, "it holds models of tokens")
LANGUAGE_MODEL = fixed("num_decoder_layers", 0, "it is no encoder with a decoder beside it")
SCALE_FOLD = Limit(
    "embedding_scale",
    lambda spec: not spec.embedding_scale,
    "it does not multiply embedded tokens by sqrt(d_model); that factor in the table, with the "
    "head untied from it, rounds unless sqrt(d_model) is a power of two",
    approx="scale-fold",
    becomes=lambda spec: dataclasses.replace(spec, embedding_scale=False, tie_embeddings=False),
)
_IS_CONSTANT = ("zeros", "empty")
NO_CROSS = Limit(
    "cross_attention",
    lambda spec: spec.cross_attention not in _IS_CONSTANT or not spec.norm_first,
    "it has no cross-attention; what that adds here is a constant",
    approx="cross-fold",
    becomes=lambda spec: dataclasses.replace(spec, cross_attention="none"),
)
NO_CROSS_AFTER_NORM = Limit(
    "cross_attention",
    lambda spec: spec.cross_attention not in _IS_CONSTANT or spec.norm_first,
    "it has no cross-attention, and here a layer norm follows it, so that it cannot be folded",
)
PRE_NORM = fixed("norm_first", True, "its layer norms stand before attention and MLP")
FINAL_NORM = fixed("final_norm", True, "it ends with a layer norm")
LEARNED = fixed("positions", "learned", "its positions are learned")
NO_HEAD_BIAS = fixed("head_bias", False, "its head has no bias")
ONE_EPS = Limit(
    "norm_eps",
    lambda spec: spec.norm_eps == 1e-5,
    "its layer norms have 1e-05",
    approx="eps",
    becomes=lambda spec: dataclasses.replace(spec, norm_eps=1e-5),
)


def parallel_biases(*, final: bool | None = None, blocks: bool | None = None) -> tuple[Limit, ...]:
    """Returns the limits of a target whose layer norms have a bias if its dense layers have.

    Args:
      final: whether the last layer norm has one whatever the others have; None for no exception.
      blocks: likewise for those of the blocks.
    """

    def wanted(spec: ModelSpec, always: bool | None, same: str) -> bool:
        return getattr(spec, same) if always is None else always

    return (
        Limit(
            "has_norm_bias",
            lambda spec: spec.has_norm_bias == wanted(spec, blocks, "bias"),
            "its layer norms have biases where its dense layers have"
            if blocks is None
            else "its layer norms have biases",
        ),
        Limit(
            "has_final_norm_bias",
            lambda spec: (
                not spec.final_norm
                or spec.has_final_norm_bias == wanted(spec, final, "has_norm_bias")
            ),
            "its last layer norm has a bias where the others have"
            if final is None
            else "its last layer norm has a bias",
        ),
    )


@dataclasses.dataclass(frozen=True)
class Reading:
    """A target's config, understood.

    Attributes:
      spec: the model that it describes.
      approximations: the limits crossed for that, reason by name.
      notes: differences that change no output, one line each.
    """

    spec: ModelSpec
    approximations: Mapping[str, str] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Facts:
    """Facts that a checkpoint file records beside the model.

    Attributes:
      step: updates made.
      val_loss: of the last evaluation, or None.
      vocabulary: character to id, of a character tokenizer; None for others, and without one.
      special_tokens: role to token of that tokenizer.
    """

    step: int = 0
    val_loss: float | None = None
    vocabulary: Mapping[str, int] | None = None
    special_tokens: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Target(abc.ABC):
    """A format outside of craft_jax that can hold a model.

    Attributes:
      name: as users give it.
      summary: one line.
      container: the files around the tensors.
      anchor: a tensor that every file of it has, by which names and files are recognised.
      other_anchors: anchors of other kinds of models.
      optional_prefix: a prefix that the names in some files lack.
      model_type: as in its `config.json`; None where it has no such file.
      tied: the head and the embedding, which are one tensor unless `tie_word_embeddings` is false.
      specs: the kinds of models that it holds.
      limits: the limits among those.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    container: ClassVar[Container]
    anchor: ClassVar[str]
    other_anchors: ClassVar[tuple[str, ...]] = ()
    optional_prefix: ClassVar[str] = ""
    model_type: ClassVar[str | None] = None
    tied: ClassVar[tuple[str, ...]] = ()
    specs: ClassVar[tuple[type[Spec], ...]] = (ModelSpec,)
    limits: ClassVar[tuple[Limit, ...]] = ()

    @abc.abstractmethod
    def table(self, spec: ModelSpec) -> Table:
        """Returns the table of names for models like this."""

    @abc.abstractmethod
    def write_config(self, spec: ModelSpec) -> dict[str, Any]:
        """Returns the part of the target's config that describes the architecture."""

    @abc.abstractmethod
    def read_config(self, config: Mapping[str, Any]) -> Reading:
        """Understands the target's config.

        Raises:
          UnknownArchitectureError: it has a setting that craft_jax lacks.
        """

    def recognises(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Returns whether tensors without a config, by clean name, have the form of this target."""
        return self.anchor in shapes

    def guess_config(
        self, shapes: Mapping[str, tuple[int, ...]], num_heads: int | None
    ) -> dict[str, Any]:
        """Returns the config of tensors that came without one, inferred from their shapes.

        Raises:
          UsageError: a setting that shapes do not determine was not given.
        """
        raise UsageError(
            f"these are tensors of {self.name}, and its config does not follow from their shapes; "
            "give it with `config=FILE`"
        )

    def complete_config(
        self, config: Mapping[str, Any] | None, tensors: Tensors, num_heads: int | None
    ) -> Mapping[str, Any]:
        """Returns the config to read: the one at hand, completed or inferred from the tensors.

        Args:
          config: from the file, beside it, or given; None for none.
          tensors: by clean names.
          num_heads: as given.

        Raises:
          UsageError: see `guess_config`.
          CorruptFileError: config and tensors contradict each other.
        """
        if config is None:
            config = self.guess_config({n: t.shape for n, t in tensors.items()}, num_heads)
        if self.tied and set(self.tied) <= tensors.keys():
            head, embedding = (tensors[name].read() for name in self.tied)
            if not same_bits(head, embedding):
                return {**config, "tie_word_embeddings": False}
        return config

    def unknown_settings(self, config: Mapping[str, Any]) -> list[str]:
        """Returns the settings of a user's config that this target does not know."""
        return []

    def config_in(self, around: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """Returns the target's config out of the dict that holds a file's tensors, or None."""
        return None

    def contents(self, tensors: Mapping[str, Any], spec: ModelSpec, facts: "Facts") -> Any:
        """Returns the content of a checkpoint file: tensors by name, and the data around them."""
        raise AssertionError(f"{self.name} is no file")

    def mapping(self, spec: ModelSpec) -> mapping.Mapping:
        """Returns the table bound to a model."""
        return self.table(spec).bind(spec.num_layers, spec.num_decoder_layers)

    def answer(self, spec: ModelSpec) -> "Answer":
        """Returns whether a model fits, and the limits that it exceeds."""
        crossed = self._crossed(spec)
        return Answer(
            target=self.name,
            exact=not crossed,
            reasons=self._reasons(spec, crossed),
            approximations=tuple(limit.approx for limit in crossed if limit.approx),
            is_possible=self._beyond(spec, crossed) is not None,
        )

    def _crossed(self, spec: ModelSpec) -> list[Limit]:
        if not isinstance(spec, self.specs):
            return [_OF_TOKENS]
        return [limit for limit in self.limits if not limit.holds(spec)]

    @staticmethod
    def _reasons(spec: ModelSpec, crossed: Sequence[Limit]) -> tuple[str, ...]:
        return tuple(
            f"{limit.attribute}={getattr(spec, limit.attribute)}: {limit.reason}"
            for limit in crossed
        )

    def _beyond(self, spec: ModelSpec, crossed: Sequence[Limit]) -> ModelSpec | None:
        """Returns a spec after crossing limits; None if the target cannot hold that either."""
        if not all(limit.approx for limit in crossed):
            return None
        for limit in crossed:
            spec = limit.becomes(spec)
        return None if self._crossed(spec) else spec

    def fit(self, spec: ModelSpec, allowed: "Allowed") -> Reading:
        """Returns the spec as the target will hold it.

        Raises:
          NotRepresentableError: it cannot, or only with approximations that were not allowed.
        """
        crossed = self._crossed(spec)
        reasons, beyond = self._reasons(spec, crossed), self._beyond(spec, crossed)
        if beyond is None or not all(allowed.covers(limit.approx) for limit in crossed):
            names = sorted({limit.approx for limit in crossed if limit.approx})
            remedy = f"; `allow_approx={','.join(names)}` accepts that" if beyond else ""
            raise NotRepresentableError(
                f"{self.name} cannot hold this model exactly: {'; '.join(reasons)}{remedy}",
                target=self.name,
                reasons=list(reasons),
            )
        return Reading(
            beyond,
            {limit.approx or "": r for limit, r in zip(crossed, reasons, strict=True)},
        )


@dataclasses.dataclass(frozen=True)
class Answer:
    """Says whether a model fits into a target.

    Attributes:
      target: its name.
      exact: every bit and every number survives.
      reasons: one line for each attribute beyond a limit.
      approximations: names for `allow_approx` that would cross them.
      is_possible: whether those names cross all of them.
    """

    target: str
    exact: bool
    reasons: tuple[str, ...]
    approximations: tuple[str, ...]
    is_possible: bool


@dataclasses.dataclass(frozen=True)
class Allowed:
    """The approximations that `allow_approx` allows: none, all, or those that it names."""

    everything: bool = False
    names: tuple[str, ...] = ()

    @classmethod
    def of(cls, value: "bool | str | Sequence[str] | Allowed | None") -> "Allowed":
        """Reads True or `all`, None or False (nothing), `gelu,eps`, or a list."""
        if isinstance(value, Allowed):
            return value
        if value is None or isinstance(value, bool):
            return cls(everything=bool(value))
        names = tuple(n.strip() for n in (value.split(",") if isinstance(value, str) else value))
        if names == ("all",):
            return cls(everything=True)
        if unknown := [name for name in names if name not in APPROXIMATIONS]:
            raise UsageError(
                f"`allow_approx={','.join(unknown)}` is not one of {', '.join(APPROXIMATIONS)}"
            )
        return cls(names=names)

    def covers(self, name: str | None) -> bool:
        """Returns whether an approximation is allowed."""
        return name is not None and (self.everything or name in self.names)


def demand(config: Mapping[str, Any], what: str, *names: str) -> list[Any]:
    """Returns the values of fields that a config must have.

    Raises:
      CorruptFileError: some are not there.
    """
    if lacking := [name for name in names if config.get(name) is None]:
        raise CorruptFileError(
            f"{what} lacks {', '.join(lacking)}; add what is missing, or give `config=FILE`"
        )
    return [config[name] for name in names]


def check_inferred(inferred: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Checks that a config does not contradict the tensors.

    Args:
      inferred: settings that follow from the tensors.
      given: settings of the config.

    Raises:
      CorruptFileError: it does; names every setting.
    """
    wrong = [
        f"{name} is {given[name]!r} by the config and {value!r} by the tensors"
        for name, value in inferred.items()
        if given.get(name) is not None and given[name] != value
    ]
    if wrong:
        raise CorruptFileError(f"{'; '.join(wrong)}; one of them belongs to another model")


def need_heads(width: int, num_heads: int | None) -> int:
    """Returns the number of heads, which no shape determines.

    Raises:
      UsageError: it is not given, or does not divide the width.
    """
    divisors = [n for n in range(1, width + 1) if width % n == 0]
    if num_heads is None:
        raise UsageError(
            "the tensors came without a config, and the number of attention heads cannot be read "
            f"from them; give `num_heads` (one of {', '.join(map(str, divisors))}) or `config=FILE`"
        )
    if num_heads not in divisors:
        raise UsageError(
            f"`num_heads={num_heads}` does not divide the width {width}; it is one of "
            + ", ".join(map(str, divisors))
        )
    return num_heads


def count_layers(names: Iterable[str], prefix: str) -> int:
    """Returns one more than the largest layer number behind a prefix."""
    numbers = [n.removeprefix(prefix).partition(".")[0] for n in names if n.startswith(prefix)]
    return max((int(number) for number in numbers if number.isdecimal()), default=-1) + 1
