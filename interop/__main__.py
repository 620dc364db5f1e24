"""The command line: `python -m interop COMMAND ARGUMENTS [options]`.

Results go to standard output, as lines or as JSON; everything else to standard error. Errors that
a user can cause become one message and an exit code, with flags for the options that they name.
"""

import argparse
import importlib
import json
import keyword
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NoReturn

from craft_jax.errors import (
    INTERRUPTED,
    KILLED,
    OK,
    STORAGE,
    CraftError,
    StorageError,
    UsageError,
)
from craft_jax.messages import with_flags
from interop.commands import FLAGS, OPTIONS

_EXAMPLES = """\
examples:
  python -m interop export outputs/models/RUN out/gpt2 --to hf
  python -m interop export outputs/models/RUN ckpt.pt --to nanogpt
  python -m interop import path/to/folder-or-file outputs/models/NEW
  python -m interop verify outputs/models/RUN out/gpt2 --level logits
  python -m interop inspect out/gpt2
  python -m interop diff outputs/models/RUN ckpt.pt
  python -m interop targets outputs/models/RUN

Each command has a --help of its own; docs/interop.md has the rest.
"""

_COMMANDS = {
    "export": "write a run for PyTorch",
    "import": "make a run out of a PyTorch model",
    "verify": "compare two models; exit 70 if they differ",
    "inspect": "what is in a file, from headers only",
    "diff": "which tensors of two models differ",
    "targets": "where a model can go",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    before = signal.signal(signal.SIGTERM, _stop)
    if sys.stdout is None:  # Closed by the caller.
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    try:
        words = [word for word in words if word != "--debug"]
        args = _parser(words).parse_args(words)
        done = _command(args.command).run(args)
        for note in done.notes:
            print(_with_flags(note), file=sys.stderr, flush=True)
        _show(done, as_json=args.json)
        sys.stdout.flush()
        return done.exit_code
    except CraftError as error:
        if debug:
            traceback.print_exc()
        print(_with_flags(str(error)), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; nothing was left behind", file=sys.stderr)
        return INTERRUPTED
    except _Stopped:
        print("stopped by SIGTERM; nothing was left behind", file=sys.stderr)
        return KILLED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except OSError as error:
        if debug:
            traceback.print_exc()
        print(f"cannot read or write: {error}", file=sys.stderr)
        return STORAGE
    finally:
        signal.signal(signal.SIGTERM, before)


class _Stopped(BaseException):
    """SIGTERM arrived."""


def _stop(number: int, frame: Any) -> NoReturn:
    raise _Stopped


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}\n({self.prog} --help)")


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """Returns the parser, with the arguments of the command that is named and of no other.

    Only that command's module is imported: `import` needs JAX.
    """
    parser = _Parser(
        prog="python -m interop",
        description="carries models between craft_jax and PyTorch, bit for bit",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    chosen = next((word for word in words if not word.startswith("-")), None)
    for name, summary in _COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        if name == chosen:
            _command(name).add_arguments(command)
        command.add_argument("--json", action="store_true", help="print the result as JSON")
        command.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def _command(name: str) -> ModuleType:
    """Returns the module of a command; `import` is a keyword of Python."""
    return importlib.import_module(f"interop.commands.{name}{'_' * keyword.iskeyword(name)}")


def _with_flags(message: str) -> str:
    return with_flags(message, OPTIONS, lambda name: FLAGS.get(name, name).replace("_", "-"))


def _show(done: Any, *, as_json: bool) -> None:
    try:
        text = json.dumps(done.value, indent=2) if as_json else _with_flags("\n".join(done.lines))
        print(text, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise StorageError(
            f"standard output cannot be written ({error}); the command itself did its work"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
