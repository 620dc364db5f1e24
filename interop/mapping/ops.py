"""The operations of a rule: typed, invertible, pure functions on numpy arrays.

An operation computes shapes without arrays. `forward` goes from craft_jax to the target, `inverse`
back. `exact` operations only move data: every bit survives, both ways. Operations return views
where they can; writers make arrays contiguous.
"""

import abc
import dataclasses
import math
from typing import ClassVar, NamedTuple

import ml_dtypes
import numpy as np

from interop.errors import (
    DtypeError,
    ShapeMismatchError,
    TiedWeightsError,
    UnexpectedKeysError,
)
from interop.mapping.tensors import Abstract, same_bits

Arrays = tuple[np.ndarray, ...]
Abstracts = tuple[Abstract, ...]


class Op(abc.ABC):
    """One step from source arrays to target arrays."""

    exact: ClassVar[bool] = True

    @abc.abstractmethod
    def shapes(self, sources: Abstracts) -> Abstracts:
        """Returns the shapes and dtypes of the output of `forward`.

        Raises:
          ShapeMismatchError, DtypeError: it cannot take them.
        """

    @abc.abstractmethod
    def forward(self, sources: Arrays) -> Arrays:
        """Returns the target arrays."""

    @abc.abstractmethod
    def inverse(self, targets: Arrays, sources: Abstracts) -> Arrays:
        """Returns the source arrays.

        Args:
          targets: the output of `forward`.
          sources: shapes of the sources; their dtypes are those of the targets.

        Raises:
          InteropError: the targets cannot come from `forward`.
        """


class Transpose(Op):
    """Swaps the two axes of a matrix: (in, out) and (out, in)."""

    def shapes(self, sources: Abstracts) -> Abstracts:
        (source,) = sources
        if len(source.shape) != 2:
            raise ShapeMismatchError(f"cannot transpose an array of shape {source.shape}")
        return (Abstract(source.shape[::-1], source.dtype),)

    def forward(self, sources: Arrays) -> Arrays:
        return (sources[0].T,)

    def inverse(self, targets: Arrays, sources: Abstracts) -> Arrays:
        return (targets[0].T,)


@dataclasses.dataclass(frozen=True)
class Concat(Op):
    """Joins arrays one after the other along an axis, such as q, k and v."""

    axis: int

    def shapes(self, sources: Abstracts) -> Abstracts:
        rest = {(*s.shape[: self.axis], *s.shape[self.axis + 1 :]) for s in sources}
        if len(rest) > 1 or any(len(s.shape) <= self.axis for s in sources):
            shapes = ", ".join(str(s.shape) for s in sources)
            raise ShapeMismatchError(f"cannot join arrays of shapes {shapes} along {self.axis}")
        if len({s.dtype for s in sources}) > 1:
            dtypes = ", ".join(str(s.dtype) for s in sources)
            raise DtypeError(
                f"the target joins arrays whose dtypes differ ({dtypes}); give all of them one "
                "with `dtype`, or use `target=craft-torch`"
            )
        shape = list(sources[0].shape)
        shape[self.axis] = sum(s.shape[self.axis] for s in sources)
        return (Abstract(tuple(shape), sources[0].dtype),)

    def forward(self, sources: Arrays) -> Arrays:
        return (np.concatenate(sources, self.axis),)

    def inverse(self, targets: Arrays, sources: Abstracts) -> Arrays:
        ends = np.cumsum([s.shape[self.axis] for s in sources])
        return tuple(np.split(targets[0], ends[:-1], self.axis))


@dataclasses.dataclass(frozen=True)
class Tie(Op):
    """One array under several names."""

    count: int = 2

    def shapes(self, sources: Abstracts) -> Abstracts:
        return sources * self.count

    def forward(self, sources: Arrays) -> Arrays:
        return sources * self.count

    def inverse(self, targets: Arrays, sources: Abstracts) -> Arrays:
        for other in targets[1:]:
            check_tied(targets[0], other)
        return targets[:1]


@dataclasses.dataclass(frozen=True)
class Zeros(Op):
    """Zeros for an array that the target demands and craft_jax lacks.

    `forward` takes only the dtype of its source; the rule does not consume it.
    """

    shape: tuple[int, ...]

    def shapes(self, sources: Abstracts) -> Abstracts:
        return (Abstract(self.shape, sources[0].dtype),)

    def forward(self, sources: Arrays) -> Arrays:
        return (np.zeros(self.shape, sources[0].dtype),)

    def inverse(self, targets: Arrays, sources: Abstracts) -> Arrays:
        if np.any(targets[0]):
            raise ShapeMismatchError(
                f"{np.count_nonzero(targets[0])} values are not zero, where craft_jax has no place "
                "for any"
            )
        return ()


@dataclasses.dataclass(frozen=True)
class OffsetRows(Op):
    """Unused zero rows before the first row of a position table."""

    count: int

    def shapes(self, sources: Abstracts) -> Abstracts:
        (source,) = sources
        return (Abstract((source.shape[0] + self.count, *source.shape[1:]), source.dtype),)

    def forward(self, sources: Arrays) -> Arrays:
        (source,) = sources
        empty = np.zeros((self.count, *source.shape[1:]), source.dtype)
        return (np.concatenate([empty, source]),)

    def inverse(self, targets: Arrays, sources: Abstracts) -> Arrays:
        return (targets[0][self.count :],)


class SinusoidBuffer(Op):
    """A table of sines (rows, d) as a buffer (1, rows, d); `inverse` checks its values."""

    def shapes(self, sources: Abstracts) -> Abstracts:
        (source,) = sources
        return (Abstract((1, *source.shape), source.dtype),)

    def forward(self, sources: Arrays) -> Arrays:
        return (sources[0][None],)

    def inverse(self, targets: Arrays, sources: Abstracts) -> Arrays:
        check_sinusoids(targets[0][0])
        return (targets[0][0],)


def check_sinusoids(table_PD: np.ndarray) -> None:
    """Checks that a table holds the sines and cosines of Vaswani et al. 2017, section 3.5.

    The tolerance grows with the position: writers round the angle to float32.

    Raises:
      UnexpectedKeysError: it holds something else.
    """
    rows, d = table_PD.shape
    position_P1 = np.arange(rows)[:, None]
    angle_PI = position_P1 * np.exp(np.arange(0, d, 2) * (-math.log(10000.0) / d))[None, :]
    wanted_PD = np.zeros((rows, d))
    wanted_PD[:, 0::2], wanted_PD[:, 1::2] = np.sin(angle_PI), np.cos(angle_PI)[:, : d // 2]
    rounding = float(ml_dtypes.finfo(table_PD.dtype).eps)
    allowed_P1 = 1e-6 + rounding + 2.0**-22 * position_P1
    with np.errstate(invalid="ignore"):
        is_near_PD = np.abs(table_PD.astype(np.float64) - wanted_PD) <= allowed_P1
    if not is_near_PD.all():
        p, i = (int(axis[0]) for axis in np.nonzero(~is_near_PD))
        raise UnexpectedKeysError(
            f"the value at position {p}, column {i} is {float(table_PD[p, i]):g} and not "
            f"{wanted_PD[p, i]:g}: this is no table of sinusoidal positions"
        )


def check_tied(a: np.ndarray, b: np.ndarray) -> None:
    """Checks that two tensors that must be one have the same bits.

    Raises:
      TiedWeightsError: they differ; the message says by how much.
    """
    if same_bits(a, b):
        return
    if a.shape != b.shape or a.dtype != b.dtype:
        what = f"one is {a.shape} {a.dtype}, the other {b.shape} {b.dtype}"
        raise TiedWeightsError(f"tied tensors differ: {what}")
    with np.errstate(all="ignore"):
        largest = max(
            (
                float(np.max(np.abs(x.astype(np.float64) - y.astype(np.float64)), initial=0.0))
                for x, y in zip(_slabs(a), _slabs(b), strict=True)
            ),
            default=0.0,
        )
    raise TiedWeightsError(f"tied tensors differ by up to {largest:.6g}", largest=largest)


def _slabs(array: np.ndarray, rows: int = 1024) -> list[np.ndarray]:
    return [array[i : i + rows] for i in range(0, len(array), rows)] if array.ndim else [array]


class Chain(NamedTuple):
    """Operations applied in order; an empty chain renames."""

    ops: tuple[Op, ...]

    @property
    def exact(self) -> bool:
        """Returns whether every bit survives."""
        return all(op.exact for op in self.ops)

    def shapes(self, sources: Abstracts) -> Abstracts:
        """See `Op.shapes`."""
        for op in self.ops:
            sources = op.shapes(sources)
        return sources

    def forward(self, sources: Arrays) -> Arrays:
        """See `Op.forward`."""
        for op in self.ops:
            sources = op.forward(sources)
        return sources

    def inverse(self, targets: Arrays, sources: Abstracts) -> Arrays:
        """See `Op.inverse`."""
        before = [sources]
        for op in self.ops[:-1]:
            before.append(op.shapes(before[-1]))
        for op, shapes in zip(reversed(self.ops), reversed(before), strict=False):
            targets = op.inverse(targets, shapes)
        return targets
