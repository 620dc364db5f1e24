"""The engine: a table of rules between the leaves of a craft_jax model and a target's tensors.

A `Table` is written once for each target, with `{i}` for the number of a layer, and `{j}` for that
of a decoder's beside an encoder. Bound to a model it is a `Mapping`, which is read in both
directions: lazily, array by array, and first of all on abstract shapes, so that whatever is
missing, left over or of another shape is known before a byte is read. Numpy only.
"""

import dataclasses
import functools
import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TypeVar

import numpy as np

from interop.errors import (
    InteropError,
    MissingKeysError,
    ShapeMismatchError,
    UnexpectedKeysError,
    listed,
    nearest,
)
from interop.mapping.ops import Chain, Op, Tie, check_tied
from interop.mapping.tensors import Abstract, LazyTensor, Tensors

Abstracts = dict[str, Abstract]
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Rule:
    """Some source leaves become some target tensors.

    Attributes:
      sources: names of leaves, `{i}` for the layer; empty for what only the target has.
      targets: names of tensors.
      ops: from sources to targets; none renames.
      like: a leaf that lends its dtype to a target without source.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    ops: tuple[Op, ...] = ()
    like: str | None = None

    @property
    def reads(self) -> tuple[str, ...]:
        """The leaves that `forward` looks at."""
        return self.sources or ((self.like,) if self.like else ())

    @property
    def chain(self) -> Chain:
        """The operations as one."""
        return Chain(self.ops)

    def found(self, targets: Collection[str]) -> tuple[str, ...]:
        """Returns the tensors to read from a file with these names; of tied ones, any present."""
        is_tie = bool(self.ops) and isinstance(self.ops[-1], Tie)
        there = tuple(name for name in self.targets if name in targets)
        return there if is_tie and there else self.targets

    @property
    def mark(self) -> str | None:
        """The placeholder for the layer in its names, or None."""
        return _mark(*self.sources, *self.targets)

    def at_layer(self, i: int) -> "Rule":
        """Returns the rule of one layer."""
        mark = self.mark or MARKS[0]

        def fill(names: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(name.replace(mark, str(i)) for name in names)

        like = self.like.replace(mark, str(i)) if self.like else None
        return Rule(fill(self.sources), fill(self.targets), self.ops, like)


MARKS = ("{i}", "{j}")


def _mark(*names: str) -> str | None:
    return next((mark for mark in MARKS for name in names if mark in name), None)


def rule(sources: str | Sequence[str], targets: str | Sequence[str], *ops: Op, like=None) -> Rule:
    """Returns a rule; a name alone may stand for a tuple of one."""

    def names(given: str | Sequence[str]) -> tuple[str, ...]:
        return (given,) if isinstance(given, str) else tuple(given)

    return Rule(names(sources), names(targets), ops, like)


@dataclasses.dataclass(frozen=True)
class Alias:
    """A second name under which files may repeat a tensor; import compares the two."""

    name: str
    of: str


@dataclasses.dataclass(frozen=True)
class Buffer:
    """A constant that files may hold beside the weights.

    Attributes:
      name: `{i}` for the layer.
      check: returns whether an array is that constant.
      what: what it must be, for the message.
    """

    name: str
    check: Callable[[np.ndarray], bool]
    what: str


@dataclasses.dataclass(frozen=True)
class Tap:
    """A place in the forward pass of both models, for comparing what happens inside.

    Attributes:
      source, target: paths of submodules, `{i}` for the layer.
      causes: likely causes if this is the first place that differs.
    """

    source: str
    target: str
    causes: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """The tensor names of a target.

    Attributes:
      rules: the tensors, in the order of the target's files.
      aliases, buffers: further tensors that import accepts.
      taps: places of the forward pass, in its order.
    """

    rules: tuple[Rule, ...]
    aliases: tuple[Alias, ...] = ()
    buffers: tuple[Buffer, ...] = ()
    taps: tuple[Tap, ...] = ()

    def bind(self, num_layers: int, num_decoder_layers: int = 0) -> "Mapping":
        """Returns the rules of a model with these numbers of layers."""
        counts = dict(zip(MARKS, (num_layers, num_decoder_layers), strict=True))

        def each(name: str) -> list[str]:
            mark = _mark(name)
            return [name.replace(mark, str(i)) for i in range(counts[mark])] if mark else [name]

        def tap_at(tap: Tap, i: int) -> Tap:
            mark = _mark(tap.source)
            source, target = (name.replace(mark, str(i)) for name in (tap.source, tap.target))
            return Tap(source, target, tap.causes)

        return Mapping(
            rules=tuple(_in_layers(self.rules, lambda r: r.mark, Rule.at_layer, counts)),
            aliases=self.aliases,
            buffers=tuple(
                dataclasses.replace(buffer, name=name)
                for buffer in self.buffers
                for name in each(buffer.name)
            ),
            taps=tuple(_in_layers(self.taps, lambda tap: _mark(tap.source), tap_at, counts)),
        )


def _in_layers(
    items: Iterable[T],
    mark_of: Callable[[T], str | None],
    at_layer: Callable[[T, int], T],
    counts: dict[str, int],
) -> Iterable[T]:
    """Expands neighbouring items of a layer together: all of layer 0, then all of layer 1."""
    for mark, group in itertools.groupby(items, mark_of):
        if mark is None:
            yield from group
        else:
            in_layer = list(group)
            yield from (at_layer(one, i) for i in range(counts[mark]) for one in in_layer)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mapping:
    """A table bound to one model. See `Table` for the attributes."""

    rules: tuple[Rule, ...]
    aliases: tuple[Alias, ...] = ()
    buffers: tuple[Buffer, ...] = ()
    taps: tuple[Tap, ...] = ()

    @functools.cached_property
    def target_names(self) -> tuple[str, ...]:
        """Every target tensor, in order."""
        return tuple(name for one in self.rules for name in one.targets)

    @functools.cached_property
    def rule_of(self) -> dict[str, Rule]:
        """The rule that makes a target tensor."""
        return {name: one for one in self.rules for name in one.targets}

    @functools.cached_property
    def rule_from(self) -> dict[str, Rule]:
        """The rule that consumes a source leaf."""
        return {name: one for one in self.rules for name in one.sources}

    @property
    def synthetic(self) -> tuple[str, ...]:
        """Target tensors without a source leaf: zeros."""
        return tuple(name for one in self.rules if not one.sources for name in one.targets)

    def shapes(self, sources: dict[str, Abstract] | Tensors) -> Abstracts:
        """Returns the shapes of the target's tensors; proves that the mapping is total.

        Raises:
          MissingKeysError, UnexpectedKeysError: a leaf is missing, or consumed by no rule.
          InteropError: a rule cannot take its leaves.
          ValueError: the table itself consumes a leaf or makes a tensor twice.
        """
        consumed = Counter(name for one in self.rules for name in one.sources)
        made = Counter(self.target_names)
        if twice := [name for names in (consumed, made) for name, n in names.items() if n > 1]:
            raise ValueError(f"the table uses {', '.join(twice)} more than once")
        if missing := [name for name in consumed if name not in sources]:
            raise _missing(missing, sources, "the source")
        if extra := [name for name in sources if name not in consumed]:
            raise UnexpectedKeysError(
                f"no rule takes {len(extra)} of the source's tensors: {listed(extra)}", keys=extra
            )
        found: Abstracts = {}
        for one in self.rules:
            reads = tuple(Abstract(sources[n].shape, sources[n].dtype) for n in one.reads)
            try:
                results = one.chain.shapes(reads)
            except InteropError as error:
                raise type(error)(f"{', '.join(one.targets)}: {error}") from None
            found.update(zip(one.targets, results, strict=True))
        return found

    def forward(self, sources: Tensors) -> dict[str, LazyTensor]:
        """Returns the target's tensors; reading one reads its sources.

        Raises:
          InteropError: see `shapes`.
        """
        shapes = self.shapes(sources)

        def read(one: Rule, index: int) -> np.ndarray:
            arrays = tuple(sources[name].read() for name in one.reads)
            return one.chain.forward(arrays)[index]

        return {
            name: LazyTensor(
                shapes[name].shape, shapes[name].dtype, functools.partial(read, one, index)
            )
            for one in self.rules
            for index, name in enumerate(one.targets)
        }

    def inverse(
        self, targets: Tensors, sources: Abstracts, ignore: Collection[str] = ()
    ) -> dict[str, LazyTensor]:
        """Returns the source's leaves; reading one reads its targets.

        Constants among the targets (`buffers`, `aliases`, zeros) are read and checked here.

        Args:
          targets: the tensors of a file, by the table's names.
          sources: the shapes that the leaves must have; their dtypes do not matter.
          ignore: further names to accept and ignore.

        Raises:
          MissingKeysError, UnexpectedKeysError, ShapeMismatchError, TiedWeightsError: with every
            name.
        """
        expected = self.shapes(sources)
        self._check_names(targets, expected, ignore)
        self._check_shapes(targets, expected)
        self._check_constants(targets)

        def read(one: Rule, index: int) -> np.ndarray:
            arrays = tuple(targets[name].read() for name in one.found(targets))
            shapes = tuple(sources[name] for name in one.sources)
            try:
                return one.chain.inverse(arrays, shapes)[index]
            except InteropError as error:
                raise type(error)(f"{', '.join(one.targets)}: {error}", **error.details) from None

        for one in self.rules:
            if not one.sources:
                self._check_zeros(one, targets)
        return {
            name: LazyTensor(
                sources[name].shape,
                targets[one.found(targets)[0]].dtype,
                functools.partial(read, one, index),
            )
            for one in self.rules
            for index, name in enumerate(one.sources)
        }

    def _check_names(self, targets: Tensors, expected: Abstracts, ignore: Collection[str]) -> None:
        allowed = {*expected, *ignore}
        allowed.update(alias.name for alias in self.aliases)
        allowed.update(buffer.name for buffer in self.buffers)
        needed = [name for one in self.rules for name in one.found(targets)]
        missing = [name for name in needed if name not in targets]
        extra = [name for name in targets if name not in allowed]
        if missing:
            raise _missing(missing, extra or targets, "the file", len(expected))
        if extra:
            raise UnexpectedKeysError(
                f"{len(extra)} tensors have no place in this architecture: {listed(extra)}; if "
                "they mean nothing, leave them out with `ignore_keys`",
                keys=extra,
            )

    def _check_shapes(self, targets: Tensors, expected: Abstracts) -> None:
        wrong = [
            f"{name} is {list(targets[name].shape)}, not {list(want.shape)}"
            + _shape_hint(targets[name].shape, want.shape)
            for name, want in expected.items()
            if name in targets and targets[name].shape != want.shape
        ]
        if wrong:
            raise ShapeMismatchError(
                f"{len(wrong)} tensors have another shape than the config gives: "
                + listed(wrong, "; "),
                tensors=wrong,
            )

    def _check_constants(self, targets: Tensors) -> None:
        for alias in self.aliases:
            if alias.name in targets:
                try:
                    check_tied(targets[alias.of].read(), targets[alias.name].read())
                except InteropError as error:
                    raise type(error)(
                        f"{alias.name} and {alias.of} are one tensor by the config, but the {error}"
                        "; set them as not tied in the config",
                        **error.details,
                    ) from None
        for buffer in self.buffers:
            if buffer.name in targets and not buffer.check(targets[buffer.name].read()):
                raise UnexpectedKeysError(
                    f"{buffer.name} is not {buffer.what}: this model computes something else",
                    keys=[buffer.name],
                )

    def _check_zeros(self, one: Rule, targets: Tensors) -> None:
        arrays = tuple(targets[name].read() for name in one.targets)
        try:
            one.chain.inverse(arrays, ())
        except InteropError as error:
            raise type(error)(f"{', '.join(one.targets)}: {error}", **error.details) from None


def _missing(
    missing: list[str], present: Collection[str], where: str, expected: int = 0
) -> MissingKeysError:
    of = f" of {expected}" if expected else ""
    return MissingKeysError(
        f"{where} lacks {len(missing)}{of} tensors: {listed(missing)}"
        + nearest(missing[0], list(present)),
        keys=missing,
    )


def _shape_hint(got: tuple[int, ...], want: tuple[int, ...]) -> str:
    if len(got) == 2 and got == want[::-1]:
        return " (looks transposed)"
    if len(got) == len(want) and got[1:] == want[1:] and got[0] > want[0]:
        return f" (padded to {got[0]} rows?)"
    return ""
