"""The command line: `python -m interop COMMAND ARGUMENTS [options]`.

Results go to standard output, as lines or as JSON; everything else to standard error. Errors that
are answers to the user end here, as one message and an exit code.
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

_EXAMPLES = """\
examples:
  python -m interop export outputs/models/RUN out/gpt2 --to hf
  python -m interop export outputs/models/RUN ckpt.pt --to nanogpt
  python -m interop import path/to/folder-or-file outputs/models/NEW
  python -m interop verify outputs/models/RUN out/gpt2 --level logits
  python -m interop inspect out/gpt2
  python -m interop diff outputs/models/RUN ckpt.pt
  python -m interop targets outputs/models/RUN

Each command has a --help of its own; docs/interop.md tells the rest.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    before = signal.signal(signal.SIGTERM, _stop)
    if sys.stdout is None:  # Closed by the caller.
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    try:
        args = _parser().parse_args([word for word in words if word != "--debug"])
        for name in ("ckpt", "src", "out", "a", "b", "path"):
            if getattr(args, name, None) == "":
                raise UsageError(f"{name.upper()} is empty; give the path of a file or folder")
        done = _command(args.command).run(args)
        for note in done.notes:
            print(note, file=sys.stderr, flush=True)
        _show(done, as_json=args.json)
        sys.stdout.flush()
        return done.exit_code
    except CraftError as error:
        if debug:
            traceback.print_exc()
        print(error, file=sys.stderr)
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


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m interop",
        description="carries models between craft_jax and PyTorch, bit for bit",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, summary: str, *places: tuple[str, str]) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        for place, meaning in places:
            made.add_argument(place, help=meaning)
        made.add_argument("--json", action="store_true", help="print the result as JSON")
        made.add_argument("--debug", action="store_true", help="show tracebacks")
        return made

    anything = "a run, a folder or a file"
    _add_export(
        command(
            "export",
            "write a run for PyTorch",
            ("ckpt", "a run, or one of its checkpoints"),
            ("out", "the folder to make; the file for nanogpt, torch-... and craft"),
        )
    )
    _add_import(
        command(
            "import",
            "make a run out of a PyTorch model",
            ("src", "a Hugging Face or craft-torch folder, a .pt or .safetensors file"),
            ("out", "the run to make, outputs/models/NAME"),
        )
    )
    verify = command(
        "verify", "compare two models; exit 70 if they differ", ("a", anything), ("b", anything)
    )
    add = verify.add_argument
    add("--level", default="bits", help="structure, bits (default), logits or generate")
    add("--seq-len", type=int, help="tokens of context for logits (default: all)")
    _add_reading(verify)
    _add_reading(
        command("inspect", "what is in a file, from headers only", ("path", anything)),
    )
    _add_reading(
        command("diff", "which tensors of two models differ", ("a", anything), ("b", anything))
    )
    _add_reading(command("targets", "where a model can go", ("path", anything)))
    return parser


def _add_export(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--to", default="auto", help="auto (default), hf, craft, or a target: see `targets`")
    add("--family", help="of Hugging Face: gpt2, biogpt or opt")
    add("--dtype", default="keep", help="keep (default), fp32, bf16, fp16 or fp64")
    add("--max-shard-size", default="5GB", help="of a safetensors file (default: 5GB)")
    add("--trim-vocab", action="store_true", help="leave out rows that stand for no token")
    add("--dry-run", action="store_true", help="say what would be written, and write nothing")
    _add_writing(parser)
    add("--verify", default="bits", help="none, bits (default) or logits")
    _add_reading(parser)


def _add_import(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--dtype", default="keep", help="keep (default), fp32, bf16, fp16 or fp64")
    _add_writing(parser)
    add("--verify", default="bits", help="none or bits (default)")
    _add_reading(parser)


def _add_writing(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--tokenizer", help="a folder or tokenizer.json to use instead; none for none")
    add("--overwrite", action="store_true", help="take the place of what is there")
    add("--probe", default="auto", help="auto (default: up to 200M parameters), none or always")
    add("--strict-finite", action="store_true", help="refuse NaN and infinities")
    add("--workers", type=int, help="threads (default: up to 4)")
    add("--max-memory", help="of arrays under way at once (default: 256MiB)")


def _add_reading(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--from", dest="kind", default="auto", help="auto (default), hf, craft, or a target's name")
    add("--n-head", type=int, help="attention heads, for tensors without a config")
    add("--config", help="a config for tensors without one: a file, or '{...}'")
    add("--strip-prefix", help="the prefix of the tensors that count")
    add("--ignore-keys", action="append", default=[], metavar="GLOB", help="tensors to leave out")
    add("--weights", default="average", help="of a run that has both: average (default) or last")
    add("--drop-zero-bias", action="store_true", help="read biases that are all zero as none")
    add(
        "--allow-approx",
        nargs="?",
        const=True,
        default=None,
        metavar="LIST",
        help="accept that numbers change: all, or names as the refusal gives them",
    )
    add(
        "--allow-global",
        action="append",
        default=[],
        metavar="NAME",
        help="a name that a pickle may mention; it is never run",
    )


def _command(name: str) -> ModuleType:
    """Returns the module of a command; `import` is a word of Python's own."""
    return importlib.import_module(f"interop.commands.{name}{'_' * keyword.iskeyword(name)}")


def _show(done: Any, *, as_json: bool) -> None:
    try:
        print(json.dumps(done.value, indent=2) if as_json else "\n".join(done.lines), flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise StorageError(
            f"standard output cannot be written ({error}); the command itself did its work"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
