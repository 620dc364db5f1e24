"""The commands, one file each: `run` takes what the command line says and returns a `Result`."""

import argparse
from typing import Any, NamedTuple

from craft_jax.errors import OK
from interop.sources.source import Options


class Result(NamedTuple):
    """What a command has to show.

    Attributes:
      value: plain JSON, for `--json`.
      lines: the same for people.
      notes: lines for standard error.
      exit_code: 0, or 70 where models differ.
    """

    value: Any
    lines: list[str]
    notes: tuple[str, ...] = ()
    exit_code: int = OK


def reading_options(args: argparse.Namespace) -> Options:
    """Returns how a foreign source is read, from the flags of a command."""
    return Options(
        kind=args.kind,
        num_heads=args.n_head,
        config=args.config,
        strip_prefix=args.strip_prefix,
        ignore_keys=tuple(args.ignore_keys),
        allow_approx=args.allow_approx,
        allow_globals=tuple(args.allow_global),
        drop_zero_bias=args.drop_zero_bias,
        weights=args.weights,
    )
