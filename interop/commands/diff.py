"""diff: compares two models leaf by leaf, bit for bit."""

import argparse
from typing import Any

import numpy as np

from interop.commands import Result, add_models
from interop.commands.reading import add_reading, reading_options
from interop.mapping import pipeline
from interop.mapping.tensors import LazyTensor, bits
from interop.sources import opening
from interop.sources.source import Options, Source


def diff(a: Any, b: Any, options: Options | None = None) -> list[dict[str, Any]]:
    """Returns one row for each leaf that differs between two models, bit for bit.

    Any two forms can be compared: both are read as leaves of craft_jax.

    Args:
      a, b: runs, checkpoints, or anything else that `open_source` opens.
      options: how to read foreign sources.

    Returns:
      Plain JSON: `name`, `what` and, for values, `count`, `first`, `values`, `largest`.
    """
    first, second = (
        model if isinstance(model, Source) else opening.open_source(model, options)
        for model in (a, b)
    )
    return differences(first, second)


def differences(a: Source, b: Source) -> list[dict[str, Any]]:
    """Returns one row for each leaf that is not the same, bit for bit, in both."""
    found: list[dict[str, Any]] = []
    for name in [*a.leaves, *(n for n in b.leaves if n not in a.leaves)]:
        if name not in a.leaves or name not in b.leaves:
            found.append({"name": name, "what": "only in one"})
    both = [name for name in a.leaves if name in b.leaves]

    def work(name: str) -> dict[str, Any] | None:
        return _difference(name, a.leaves[name], b.leaves[name])

    def cost(name: str) -> int:
        return 2 * (a.leaves[name].nbytes + b.leaves[name].nbytes)

    return found + [row for row in pipeline.ordered(work, both, cost) if row]


def _difference(name: str, a: LazyTensor, b: LazyTensor) -> dict[str, Any] | None:
    if a.shape != b.shape or a.dtype != b.dtype:
        what = f"{a.dtype.name} {list(a.shape)} and {b.dtype.name} {list(b.shape)}"
        return {"name": name, "what": what}
    x, y = a.read(), b.read()
    unequal = bits(x) != bits(y)
    count = int(np.count_nonzero(unequal))
    if not count:
        return None
    where = tuple(int(i[0]) for i in np.nonzero(unequal))
    with np.errstate(all="ignore"):
        gap = np.abs(x[unequal].astype(np.float64) - y[unequal].astype(np.float64))
    return {
        "name": name,
        "what": f"{count} of {x.size} values",
        "count": count,
        "first": where,
        "largest": float(np.max(gap)),
        "values": [float(x[where]), float(y[where])],
    }


def describe(row: dict[str, Any], a: Source, b: Source) -> str:
    """Returns a row of `differences` as one line, with the names that the targets use."""
    places = [row["name"]]
    for model in (a, b):
        if model.rules and row["name"] in model.rules.rule_from:
            places += [t for t in model.rules.rule_from[row["name"]].targets if t not in places]
    name = places[0] + (f" ({', '.join(places[1:])})" if len(places) > 1 else "")
    if "count" not in row:
        return f"{name}: {row['what']}"
    x, y = row["values"]
    return (
        f"{name}: {row['what']} differ, the first at {list(row['first'])}: {x!r} and {y!r}; the "
        f"largest difference is {row['largest']:.3g}"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    add_models(parser, "a", "b")
    add_reading(parser)


def run(args: argparse.Namespace) -> Result:
    """Runs the command."""
    rows = diff(args.a, args.b, reading_options(args))
    lines = [
        f"{row['name']}: {row['what']}"
        + (f", largest difference {row['largest']:.6g}" if "largest" in row else "")
        for row in rows
    ]
    return Result(rows, [*lines, f"{len(rows)} tensors differ"])
