"""diff: compares two models leaf by leaf, bit for bit."""

import argparse
from typing import Any

from interop.commands import Result, reading_options, verify
from interop.sources import opening
from interop.sources.source import Options, Source


def diff(a: Any, b: Any, options: Options | None = None) -> list[dict[str, Any]]:
    """Returns one row for each leaf that two models do not have alike, bit for bit.

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
    return verify.differences(first, second)


def run(args: argparse.Namespace) -> Result:
    """Runs the command."""
    rows = diff(args.a, args.b, reading_options(args))
    lines = [
        f"{row['name']}: {row['what']}"
        + (f", largest difference {row['largest']:.6g}" if "largest" in row else "")
        for row in rows
    ]
    return Result(rows, [*lines, f"{len(rows)} tensors differ"])
