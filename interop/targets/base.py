"""What a target is: a table of names, the limits of what it can hold, and its own config.

A target's file defines one subclass of `Target`; nothing else of the project knows its names.
"""

import abc
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

from craft_jax.errors import UsageError
from interop import mapping
from interop.errors import CorruptFileError, NotRepresentableError
from interop.mapping import Table
from interop.spec import ModelSpec

Container = Literal["hf", "craft-torch", "nanogpt"]


APPROXIMATIONS = {
    "gelu": "another form of GELU",
    "eps": "another epsilon in the layer norms",
    "dropout": "one rate of dropout in place of several; changes training only",
    "upcast": "attention in the dtype of its operands",
    "config": "settings that mean nothing here are dropped",
}
"""What `--allow-approx` may name."""


@dataclasses.dataclass(frozen=True)
class Limit:
    """Something that a target cannot hold.

    Attributes:
      attribute: of `ModelSpec`.
      holds: whether a spec is within the limit.
      reason: what the target has instead.
      approx: the name under which `--allow-approx` may cross it; None where nothing can.
      becomes: what a spec turns into when it is crossed.
    """

    attribute: str
    holds: Callable[[ModelSpec], bool]
    reason: str
    approx: str | None = None
    becomes: Callable[[ModelSpec], ModelSpec] = lambda spec: spec


@dataclasses.dataclass(frozen=True)
class Reading:
    """A target's config, understood.

    Attributes:
      spec: what it says.
      approximations: what had to be crossed for that, name by reason.
    """

    spec: ModelSpec
    approximations: Mapping[str, str] = dataclasses.field(default_factory=dict)


class Target(abc.ABC):
    """A place outside of craft_jax where a model can live.

    Attributes:
      name: as in `--to`.
      summary: one line.
      container: the files around the tensors.
      anchor: a tensor that every file of it has, by which names and files are recognised.
      optional_prefix: what the names of some files lack.
      model_type: as in its `config.json`; None where it has no such file.
      limits: what it cannot hold.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    container: ClassVar[Container]
    anchor: ClassVar[str]
    optional_prefix: ClassVar[str] = ""
    model_type: ClassVar[str | None] = None
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
          UnknownArchitectureError: it says something that craft_jax does not have.
        """

    def recognises(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Whether tensors with these clean names and shapes, and no config, are of this target."""
        return self.anchor in shapes

    def guess_config(
        self, shapes: Mapping[str, tuple[int, ...]], num_heads: int | None
    ) -> dict[str, Any]:
        """Returns the config of tensors that came without one, as far as shapes tell.

        Raises:
          UsageError: what they cannot tell was not given; asks for it.
        """
        raise UsageError(
            f"these are the tensors of {self.name}, but what the config of such a model says "
            "cannot be read from them; give it with --config FILE"
        )

    def mapping(self, spec: ModelSpec) -> mapping.Mapping:
        """Returns the table bound to a model."""
        return self.table(spec).bind(spec.num_layers)

    def answer(self, spec: ModelSpec) -> "Answer":
        """Returns whether a model fits, and what stands in the way."""
        crossed = [limit for limit in self.limits if not limit.holds(spec)]
        return Answer(
            target=self.name,
            exact=not crossed,
            reasons=tuple(
                f"{limit.attribute}={getattr(spec, limit.attribute)}: {limit.reason}"
                for limit in crossed
            ),
            approximations=tuple(limit.approx for limit in crossed if limit.approx),
            is_possible=all(limit.approx for limit in crossed),
        )

    def fit(self, spec: ModelSpec, allowed: "Allowed") -> Reading:
        """Returns the spec as the target will hold it.

        Raises:
          NotRepresentableError: it cannot, or only with approximations that were not allowed.
        """
        crossed = [limit for limit in self.limits if not limit.holds(spec)]
        answer = self.answer(spec)
        refused = [limit for limit in crossed if not allowed.covers(limit.approx)]
        if refused:
            remedies = sorted({limit.approx for limit in refused if limit.approx})
            remedy = (
                f"; --allow-approx={','.join(remedies)} accepts that" if answer.is_possible else ""
            )
            raise NotRepresentableError(
                f"{self.name} cannot hold this model exactly: {'; '.join(answer.reasons)}{remedy}",
                target=self.name,
                reasons=list(answer.reasons),
            )
        for limit in crossed:
            spec = limit.becomes(spec)
        return Reading(
            spec, {limit.approx or "": r for limit, r in zip(crossed, answer.reasons, strict=True)}
        )


@dataclasses.dataclass(frozen=True)
class Answer:
    """Whether a model fits into a target.

    Attributes:
      target: its name.
      exact: every bit and every number survives.
      reasons: one line for each attribute that stands in the way.
      approximations: names for `--allow-approx` that would cross them.
      is_possible: whether those names cross all of them.
    """

    target: str
    exact: bool
    reasons: tuple[str, ...]
    approximations: tuple[str, ...]
    is_possible: bool


@dataclasses.dataclass(frozen=True)
class Allowed:
    """What `--allow-approx` allows: nothing, everything, or a list of names."""

    everything: bool = False
    names: tuple[str, ...] = ()

    @classmethod
    def of(cls, value: "bool | str | Sequence[str] | Allowed | None") -> "Allowed":
        """Reads True (all), None or False (nothing), `gelu,eps`, or a list."""
        if isinstance(value, Allowed):
            return value
        if value is None or isinstance(value, bool):
            return cls(everything=bool(value))
        names = tuple(n.strip() for n in (value.split(",") if isinstance(value, str) else value))
        if unknown := [name for name in names if name not in APPROXIMATIONS]:
            raise UsageError(
                f"--allow-approx={','.join(unknown)} is not one of {', '.join(APPROXIMATIONS)}"
            )
        return cls(names=names)

    def covers(self, name: str | None) -> bool:
        """Whether an approximation is allowed."""
        return name is not None and (self.everything or name in self.names)


def demand(config: Mapping[str, Any], what: str, *names: str) -> list[Any]:
    """Returns the values of fields that a config must have.

    Raises:
      CorruptFileError: some are not there.
    """
    if lacking := [name for name in names if config.get(name) is None]:
        raise CorruptFileError(
            f"{what} lacks {', '.join(lacking)}; add what is missing, or give --config FILE"
        )
    return [config[name] for name in names]


def need_heads(width: int, num_heads: int | None) -> int:
    """Returns the number of heads, which no tensor tells.

    Raises:
      UsageError: it is not given, or does not divide the width.
    """
    divisors = [n for n in range(1, width + 1) if width % n == 0]
    if num_heads is None:
        raise UsageError(
            "the tensors came without a config, and the number of attention heads cannot be read "
            f"from them; give --n-head (one of {', '.join(map(str, divisors))}) or --config FILE"
        )
    if num_heads not in divisors:
        raise UsageError(
            f"--n-head={num_heads} does not divide the width {width}; it is one of "
            + ", ".join(map(str, divisors))
        )
    return num_heads


def count_layers(names: Iterable[str], prefix: str) -> int:
    """Returns one more than the largest layer number behind a prefix."""
    numbers = [name.removeprefix(prefix).partition(".")[0] for name in names if prefix in name]
    return max((int(number) for number in numbers if number.isdecimal()), default=-1) + 1
