"""The flags that say how a foreign source is read."""

import argparse

from interop.sources.source import Options


def add_reading(parser: argparse.ArgumentParser) -> None:
    """Declares the flags that say how a foreign source is read."""
    add = parser.add_argument
    add("--from", dest="kind", default="auto", help="auto (default), hf, craft, or a target's name")
    add("--n-head", type=int, help="attention heads, for tensors without a config")
    add("--config", help="a config for tensors without one: a file, or '{...}'")
    add("--strip-prefix", help="read only the tensors with this prefix")
    add("--ignore-keys", action="append", default=[], metavar="GLOB", help="tensors to leave out")
    add("--weights", default="average", help="of a run that has both: average (default) or last")
    add("--checkpoint", default="last", help="of a run: last (default), best or a step")
    add("--drop-zero-bias", action="store_true", help="read biases that are all zero as none")
    add(
        "--allow-approx",
        nargs="?",
        const=True,
        default=None,
        metavar="LIST",
        help="accept that numbers change: all, or the names that the refusal gives",
    )
    add(
        "--allow-global",
        action="append",
        default=[],
        metavar="NAME",
        help="a name that a pickle may mention; it is never run",
    )


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
        checkpoint=args.checkpoint,
    )
