"""The command line: `python -m craft_jax.main [command] --config=FILE[:preset] [flags]`.

It is short and imports little, because `--help` should be quick and worker processes import it
again: a command is a module of `craft_jax.commands` and is imported by name when it is called.
Errors that are answers to the user end here, as one message and an exit code.
"""

import argparse
import contextlib
import difflib
import gc
import importlib
import io
import os
import pathlib
import signal
import sys
import traceback
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple, NoReturn

from craft_jax.checkpoint import lock
from craft_jax.errors import (
    INTERRUPTED,
    KILLED,
    OK,
    PREEMPTED,
    STORAGE,
    CraftError,
    StoppedError,
    UsageError,
)


class _Command(NamedTuple):
    module: str
    summary: str


COMMANDS = {
    "train": _Command("train", "train a new run, or continue one (the default)"),
    "evaluate": _Command("evaluate", "loss, perplexity, bits per byte, accuracy of a run"),
    "generate": _Command("generate", "text or images from a run"),
    "prepare": _Command("prepare", "tokenize the text of a config ahead of training"),
    "tokenizer": _Command("tokenizer", "make the tokenizer of a config, and say how it does"),
    "data": _Command("data", "show what a model will see: sources, splits, real batches"),
    "benchmark": _Command("benchmark", "measure training and sampling of a config on this machine"),
    "visualize": _Command("visualize", "draw the curves of one or several runs"),
    "runs": _Command("runs", "list the runs with state, step, loss and age"),
    "verify": _Command("verify", "check every byte of a run's checkpoints"),
}

_OF_DATA = ("prepare", "tokenizer", "data")

_EXAMPLES = """\
examples:
  python -m craft_jax.main --config=configs/gpt.py
  python -m craft_jax.main --config=configs/gpt.py:small --config.data.path=my_texts/
  python -m craft_jax.main --run=latest                        # continue
  python -m craft_jax.main evaluate --run=latest
  python -m craft_jax.main generate --run=latest --prompt="def " --max_new_tokens=200
  python -m craft_jax.main generate --run=latest --prompt="def " --num_beams=4
  python -m craft_jax.main generate --run=latest --label=3 --num_samples=16
  python -m craft_jax.main visualize --run=one --run=another
  python -m craft_jax.main prepare --config=configs/gpt.py
  python -m craft_jax.main tokenizer --config=configs/gpt.py --out=tokenizer.json
  python -m craft_jax.main data --config=configs/gpt.py
  python -m craft_jax.main benchmark --config=configs/gpt.py
  python -m craft_jax.main runs
  python -m craft_jax.main verify --run=latest

Any field of the config can be set with --config.SECTION.FIELD=VALUE; docs/configuration.md lists
them. Each command has a --help of its own.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    if sys.stdout is None:  # Closed by the caller.
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # A terminal that does not know every character.
            stream.reconfigure(errors="backslashreplace")
    try:
        args = _parse([word for word in words if word != "--debug"])
        if (
            args.command == "train"
            and args.run
            and args.replay_step is None
            and not args.coordinator
        ):
            # Before what takes seconds to import.
            lock.check_free(pathlib.Path(args.workdir).expanduser() / "models" / args.run)
        code = _load(COMMANDS[args.command].module).run(args)
        sys.stdout.flush()
        return code
    except (CraftError, StoppedError) as error:
        if debug:
            traceback.print_exc()
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if debug:
            traceback.print_exc()
        print(f"cannot read or write: {error}", file=sys.stderr)
        return STORAGE


class _Override(NamedTuple):
    """See `craft_jax.config.Override`, which is not imported here."""

    field: str
    text: str


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}\n(python -m craft_jax.main --help)")


def _parse(words: Sequence[str]) -> argparse.Namespace:
    overrides, rest = _take_overrides(words)
    if rest and not rest[0].startswith("-"):
        command, *rest = rest
        if command not in COMMANDS:
            close = difflib.get_close_matches(command, COMMANDS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(COMMANDS)}"
            raise UsageError(f"{command!r} is no command; {hint}")
    elif rest and rest[0] in ("-h", "--help"):
        _overview().print_help()
        raise SystemExit(0)
    else:
        command = "train"
    args = _parser(command).parse_args(rest)
    args.command, args.overrides = command, overrides
    if "://" in args.workdir:
        raise UsageError(
            f"--workdir={args.workdir} is no folder of a disk, and a run needs its locks and "
            "renames; use one, and copy it to the bucket meanwhile (docs/tpu-vms.md says how)"
        )
    return args


def _take_overrides(words: Sequence[str]) -> tuple[list[_Override], list[str]]:
    """Separates `--config.a.b=value` (or `--config.a.b value`, or a bare flag) from the rest."""
    overrides, rest = [], []
    waiting = list(words)
    while waiting:
        word = waiting.pop(0)
        if not word.startswith("--config."):
            rest.append(word)
            continue
        field, equals, text = word.removeprefix("--config.").partition("=")
        if not equals:
            has_value = waiting and not waiting[0].startswith("--")
            text = waiting.pop(0) if has_value else "true"
        overrides.append(_Override(field, text))
    return overrides, rest


def _overview() -> argparse.ArgumentParser:
    rows = "\n".join(f"  {name:<10} {command.summary}" for name, command in COMMANDS.items())
    return argparse.ArgumentParser(
        prog="python -m craft_jax.main",
        usage="python -m craft_jax.main [command] --config=FILE[:preset] "
        "[--config.a.b=VALUE ...] [--workdir=outputs] [--run=NAME|PATH|latest] [flags]",
        description=f"commands:\n{rows}",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )


def _parser(command: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=f"python -m craft_jax.main {command}",
        description=COMMANDS[command].summary,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--workdir", default="outputs", help="where everything is written (default: outputs)")
    add("--debug", action="store_true", help="show tracebacks")
    if command == "visualize":
        add("--run", action="append", help="name, path or latest; repeat it to compare runs")
        return parser
    if command == "runs":
        return parser
    add("--run", help="name or path of a run, or latest")
    if command == "verify":
        return parser
    if command in ("train", "benchmark", *_OF_DATA):
        add("--config", help="a config file, and its preset behind a colon")
    else:
        add("--tokenizer", help="a tokenizer.json, for an imported model that came without one")
        add(
            "--weights",
            choices=("average", "last"),
            default="average",
            help="which, where the optimizer kept an average of them (default: average)",
        )
    if command == "train":
        add("--tokenizer", help="the same as --config.data.tokenizer")
        add("--replay_step", type=int, help="make this step of --run again, and show its batch")
        add(
            "--coordinator",
            help="HOST:PORT of process 0, where several processes train; auto on a TPU pod or in "
            "a job of SLURM or Open MPI",
        )
        add("--num_processes", type=int, help="how many of them there are")
        add("--process_id", type=int, help="which one this is, from 0")
    if command == "benchmark":
        add("--steps", type=int, default=20, help="timed steps (default: 20)")
        add(
            "--decode_batches",
            type=int,
            nargs="+",
            default=[1, 8],
            help="rows that are sampled at once (default: 1 8)",
        )
    if command == "tokenizer":
        add("--out", help="where to write the tokenizer.json")
    if command == "data":
        add("--split", choices=("train", "val", "test"), default="train", help="which batches")
        add("--step", type=int, default=0, help="which batch, from 0 (default: 0)")
        add("--rows", type=int, default=4, help="how many of its rows (default: 4)")
    if command == "evaluate":
        add("--split", choices=("val", "train", "test"), default="val", help="what to evaluate on")
        add("--text", help="a text file to evaluate on instead; .tsv or .jsonl for pairs")
    if command == "generate":
        _add_sampling(parser)
    return parser


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--prompt", action="append", help="text to continue, or a source; repeat it for several")
    add("--prompt_file", help="a file with a prompt in each line; - for standard input")
    add("--max_new_tokens", type=int, help="tokens per sample (default: 200)")
    add(
        "--num_samples",
        type=int,
        help="samples of each prompt, label or image (default: 1; of images, 4 to 16)",
    )
    add(
        "--temperature",
        type=float,
        help="0 takes the most likely (default: 0.8; 0 for pairs, 1 for images)",
    )
    add("--top_k", type=int, help="only the k most likely tokens")
    add("--top_p", type=float, help="only the most likely with this probability (default: 1)")
    add(
        "--min_p",
        type=float,
        help="none below this fraction of the highest probability (default: 0)",
    )
    add("--repetition_penalty", type=float, help="above 1 avoids repetition (default: 1)")
    add("--seed", type=int, default=0, help="of the randomness (default: 0)")
    add("--num_beams", type=int, default=1, help="above 1: search instead of sampling (default: 1)")
    add("--length_penalty", type=float, default=0.0, help="above 0 prefers longer texts of beams")
    add("--label", action="append", help="of images: a class, by name; repeat it for several")
    add(
        "--image",
        action="append",
        help="of images: complete the upper half of this file, of those of this folder, or of the "
        "first of a split (val); repeat it for several",
    )
    add("--num_steps", type=int, help="of a flow: steps from noise to image (default: 50)")
    add("--solver", help="of a flow: euler or heun (default: heun)")
    add("--guidance", type=float, help="of a flow: above 1 keeps closer to the label (default: 1)")


def _load(command: str) -> ModuleType:
    """Imports a command; no garbage is looked for meanwhile, for there is none."""
    gc.disable()
    try:
        return importlib.import_module(f"craft_jax.commands.{command}")
    finally:
        gc.enable()


def _run_as_program() -> NoReturn:
    # Until a command has handlers of its own; a training run that is asked to end can be resumed.
    signal.signal(signal.SIGTERM, _end_early)
    signal.signal(signal.SIGUSR1, _end_early)
    code = main()
    if code != OK:
        # Whoever asked for the end does not wait for threads that prepare data, nor a process that
        # failed for those that train with it.
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


def _end_early(number: int, frame: object) -> NoReturn:
    with contextlib.suppress(OSError):
        os.write(2, f"stopped by {signal.Signals(number).name}\n".encode())
    os._exit(PREEMPTED if number == signal.SIGUSR1 or _is_training() else KILLED)


# It gives way to a command's own handlers, and is not called after them.
_end_early.gives_way = True  # type: ignore[attr-defined]


def _is_training() -> bool:
    return len(sys.argv) < 2 or sys.argv[1].startswith("-") or sys.argv[1] == "train"


if __name__ == "__main__":
    _run_as_program()
