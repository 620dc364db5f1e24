"""The commands, one file each: `add_arguments` declares the command line, `run` returns a `Result`.

The library names an option by its field, in backticks, such as `allow_approx=eps`;
`interop/__main__` prints the flag instead.
"""

import argparse
from typing import Any, NamedTuple

from craft_jax.errors import OK

FLAGS = {
    "target": "to",
    "kind": "from",
    "num_heads": "n_head",
    "allow_globals": "allow_global",
}
"""The flags, written with underscores, whose names are not those of the fields."""

OPTIONS = (
    *("target", "family", "dtype", "max_shard_size", "trim_vocab", "verify", "level", "seq_len"),
    *("tokenizer", "overwrite", "probe", "strict_finite", "workers", "max_memory"),
    *("kind", "num_heads", "config", "strip_prefix", "ignore_keys", "weights", "checkpoint"),
    *("drop_zero_bias", "allow_approx", "allow_globals"),
)
"""The fields that have a flag."""


class Result(NamedTuple):
    """The result of a command.

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


def path(text: str) -> str:
    """Returns a path of the command line, which must not be empty."""
    if not text:
        raise argparse.ArgumentTypeError("is empty; give the path of a file or folder")
    return text


def count(text: str) -> int:
    """Returns a number of the command line that is at least 1."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text} must be a whole number of at least 1")
    return int(text)


def add_models(parser: argparse.ArgumentParser, *names: str) -> None:
    """Declares positional arguments that are models."""
    for name in names:
        parser.add_argument(name, type=path, help="a run, a folder or a file")


def add_writing(parser: argparse.ArgumentParser) -> None:
    """Declares the flags of commands that write a model."""
    add = parser.add_argument
    add("--dtype", default="keep", help="keep (default), fp32, bf16, fp16 or fp64")
    add("--tokenizer", help="a folder or tokenizer.json to use instead; none for none")
    add("--overwrite", action="store_true", help="replace the model that is there")
    add("--probe", default="auto", help="auto (default: up to 200M parameters), none or always")
    add("--strict-finite", action="store_true", help="refuse NaN and infinities")
    add("--workers", type=count, help="threads (default: up to 4)")
    add("--max-memory", help="of arrays in flight at once (default: 256MiB)")
