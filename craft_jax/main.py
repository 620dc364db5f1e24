"""The command line: `python -m craft_jax.main [command] --config=FILE[:preset] [flags]`.

It is short and imports little, because `--help` should be quick and worker processes import it
again: a command is a module of `craft_jax.commands` and is imported by name when it is called.
Errors that are answers to the user end here, as one message and an exit code.
"""

import argparse
import contextlib
import gc
import importlib
import io
import os
import pathlib
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import NamedTuple, NoReturn

from craft_jax import unknown_flags
from craft_jax.checkpoint import lock
from craft_jax.commands import arguments
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
from craft_jax.fields import Override
from craft_jax.messages import suggest, with_flags


class _Command(NamedTuple):
    add_arguments: Callable[[argparse.ArgumentParser], None]
    summary: str


COMMANDS = {
    "train": _Command(arguments.train, "train a new run, or continue one (the default)"),
    "evaluate": _Command(arguments.evaluate, "loss, perplexity, bits per byte, accuracy of a run"),
    "generate": _Command(arguments.generate, "text or images from a run"),
    "prepare": _Command(arguments.config_or_run, "tokenize the text of a config before training"),
    "tokenizer": _Command(
        arguments.tokenizer, "make the tokenizer of a config, and show how well it compresses"
    ),
    "data": _Command(arguments.data, "show what a model will see: sources, splits, real batches"),
    "benchmark": _Command(
        arguments.benchmark, "measure training and sampling of a config on this machine"
    ),
    "visualize": _Command(arguments.several_runs, "draw the curves of one or several runs"),
    "runs": _Command(lambda parser: None, "list the runs with state, step, loss and age"),
    "verify": _Command(arguments.one_checkpoint, "check every byte of a run's checkpoints"),
}

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
        code = _load(args.command).run(args)
        sys.stdout.flush()
        return code
    except (CraftError, StoppedError) as error:
        if debug:
            traceback.print_exc()
        print(_with_flags(str(error)), file=sys.stderr)
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


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}\n(python -m craft_jax.main --help)")


def _parse(words: Sequence[str]) -> argparse.Namespace:
    overrides, rest = _take_overrides(words)
    if rest and not rest[0].startswith("-"):
        command, *rest = rest
        if command not in COMMANDS:
            if ".py" in command:
                hint = f"; did you mean --config={command}?"
            else:
                hint = suggest(command, COMMANDS) or f"; there are {', '.join(COMMANDS)}"
            raise UsageError(f"{command!r} is no command{hint}")
    elif rest and rest[0] in ("-h", "--help"):
        _overview().print_help()
        raise SystemExit(0)
    else:
        command = "train"
    args, unknown = _parser(command).parse_known_args(rest)
    if unknown or "=" in rest:
        raise UsageError(unknown_flags.explain(unknown or ["="], command, _options()))
    args.command, args.overrides = command, overrides
    if "://" in args.workdir:
        raise UsageError(
            f"--workdir={args.workdir} is no folder of a disk, and a run needs its locks and "
            "renames; use one, and copy it to the bucket meanwhile (docs/tpu-vms.md says how)"
        )
    return args


def _take_overrides(words: Sequence[str]) -> tuple[list[Override], list[str]]:
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
        overrides.append(Override(field, text))
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
    arguments.every_command(parser)
    COMMANDS[command].add_arguments(parser)
    return parser


def _with_flags(message: str) -> str:
    """Spells the options and the fields of the config that a message names as flags."""
    options = {name for names in _options().values() for name in names}
    return with_flags(message, [*options, r"config\.[\w.]+"])


def _options() -> dict[str, list[str]]:
    """Returns the names of the options of each command."""
    return {command: list(vars(_parser(command).parse_args([]))) for command in COMMANDS}


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
