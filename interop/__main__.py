"""The command line: `python -m interop COMMAND ARGUMENTS [options]`.

Results go to standard output, as lines or as JSON; everything else to standard error. Errors that
are answers to the user end here, as one message and an exit code.
"""

import argparse
import importlib
import json
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from craft_jax.errors import (
    FAILED_CHECK,
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
        code = _COMMANDS[args.command](args)
        sys.stdout.flush()
        return code
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


def _options(args: argparse.Namespace) -> Any:
    return importlib.import_module("interop.sources.source").Options(
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


def _export(args: argparse.Namespace) -> int:
    export = importlib.import_module("interop.commands.export")
    if args.workers is not None and args.workers < 1:
        raise UsageError(f"--workers={args.workers} must be at least 1")
    planned = {
        "family": args.family,
        "dtype": args.dtype,
        "max_shard_size": args.max_shard_size,
        "max_memory": args.max_memory,
        "tokenizer": args.tokenizer,
        "trim_vocab": args.trim_vocab,
        "allow_approx": args.allow_approx,
        "options": _options(args),
    }
    if args.dry_run:
        plan = export.plan(args.ckpt, args.to, **planned)
        _show(args, plan.to_json(), _plan_lines(plan))
        return OK
    done = export.export_checkpoint(
        args.ckpt,
        args.out,
        args.to,
        overwrite=args.overwrite,
        verify=args.verify,
        probe=args.probe,
        workers=args.workers,
        strict_finite=args.strict_finite,
        **planned,
    )
    _say(done.notes)
    _show(args, done.to_json(), _export_lines(done))
    return OK


def _export_lines(done: Any) -> list[str]:
    plan = done.plan
    exact = "exact" if plan.is_exact else "not exact, as allowed"
    lines = [
        f"{done.out}: {plan.target.name}, {plan.source.num_params:,} parameters, "
        f"{plan.num_bytes:,} bytes, {exact}",
        f"verified   {_VERIFIED[done.manifest['verified']]}",
    ]
    if done.manifest["probe"]:
        script = shlex.quote(str(done.out / "verify.py"))
        lines.append(f"probe      python {script} proves it wherever it is loaded")
    folder = shlex.quote(str(done.out.parent))
    model_class = (plan.target.write_config(plan.spec).get("architectures") or ["a model"])[0]
    usage = {
        "hf": f'AutoModelForCausalLM.from_pretrained("{done.out}")',
        "craft-torch": f'{model_class}.from_pretrained("{done.out}"), in modeling_craft.py',
        "nanogpt": f"python sample.py --init_from=resume --out_dir={folder}"
        + ("" if done.out.name == "ckpt.pt" else ", with the file named ckpt.pt"),
        "torch": f'module.load_state_dict(torch.load("{done.out}")), a module as docs/interop.md '
        "builds it",
        "craft": f'torch.load("{done.out}")["model_state_dict"], in Craft itself',
    }
    return [*lines, f"load       {usage[plan.target.container]}"]


_VERIFIED = {
    "none": "nothing (--verify none)",
    "bits": "every bit of the files, read back, against the checkpoint",
    "logits": "every bit of the files, and float64 logits of PyTorch against JAX",
}


def _plan_lines(plan: Any) -> list[str]:
    rows = [
        f"  {name}  {tensor.dtype.name} {list(tensor.shape)}  from "
        + (", ".join(plan.rules.rule_of[name].sources) or "nothing: zeros")
        for name, tensor in plan.tensors.items()
    ]
    exact = "exact" if plan.is_exact else "not exact"
    return [
        f"{plan.source.path} to {plan.target.name}: {exact}, {plan.num_bytes:,} bytes in "
        f"{len(plan.tensors)} tensors, about {plan.peak_bytes:,} bytes of arrays in memory",
        *rows,
        "nothing was written (--dry-run)",
    ]


def _import(args: argparse.Namespace) -> int:
    size = importlib.import_module("interop.commands.export").memory_size
    done = importlib.import_module("interop.commands.import_").import_checkpoint(
        args.src,
        args.out,
        options=_options(args),
        dtype=args.dtype,
        tokenizer=args.tokenizer,
        overwrite=args.overwrite,
        verify=args.verify,
        probe=args.probe,
        strict_finite=args.strict_finite,
        workers=args.workers,
        max_memory=size(args.max_memory),
    )
    _say(done.notes)
    lines = [f"{done.out}: a run, from {done.source.kind}, {done.source.num_params:,} parameters"]
    if done.model_sha256:
        lines.append("verified   every bit of the checkpoint, read back, against the source")
    if done.probe:
        lines.append(f"probe      {done.probe} float64 logits agree with those that were recorded")
    run = shlex.quote(f"--run={done.out}")
    tokenizer = "" if done.source.tokenizer or done.source.images else " --tokenizer=PATH"
    data = "pairs=FILE" if done.source.spec.num_decoder_layers else "path=TEXT"
    if done.source.images:
        data = "path=FOLDER"
    lines += [
        f"generate   python -m craft_jax.main generate {run}{tokenizer}",
        f"train on   python -m craft_jax.main {run} --config.data.{data}{tokenizer}",
    ]
    _show(args, done.to_json(), lines)
    return OK


def _verify(args: argparse.Namespace) -> int:
    report = importlib.import_module("interop.commands.verify").verify(
        args.a, args.b, args.level, seq_len=args.seq_len, options=_options(args)
    )
    _say(report.figures.get("notes", ()))
    word = "OK" if report.passed else "FAILED"
    _show(args, report.to_json(), [f"{word}: {report.summary}", *_first(report.problems)])
    return OK if report.passed else FAILED_CHECK


def _inspect(args: argparse.Namespace) -> int:
    found = importlib.import_module("interop.commands.inspect").inspect(args.path, _options(args))
    _say(found["notes"])
    lines = [
        f"{found['path']}: {found['kind'] or 'no model that interop knows'}, "
        f"{found['parameters']:,} parameters, {found['bytes']:,} bytes, "
        f"{', '.join(found['dtypes'])}"
    ]
    if found["problem"]:
        lines.append(f"problem: {found['problem']}")
    if found["model"]:
        lines.append("  ".join(f"{name}={value}" for name, value in found["model"].items()))
    for name, tensor in found["tensors"].items():
        lines.append(f"  {name}  {tensor['dtype']} {tensor['shape']}")
    _show(args, found, lines)
    return OK


def _diff(args: argparse.Namespace) -> int:
    rows = importlib.import_module("interop.commands.inspect").diff(args.a, args.b, _options(args))
    lines = [
        f"{row['name']}: {row['what']}"
        + (f", largest difference {row['largest']:.6g}" if "largest" in row else "")
        for row in rows
    ]
    _show(args, rows, [*lines, f"{len(rows)} tensors differ"])
    return OK


def _targets(args: argparse.Namespace) -> int:
    inspection = importlib.import_module("interop.commands.inspect")
    found = importlib.import_module("interop.sources.source").open_source(args.path, _options(args))
    targets = importlib.import_module("interop.targets.registry").TARGETS
    answers = inspection.targets_for(found.spec)
    rows = [
        {
            "target": answer.target,
            "exact": answer.exact,
            "reasons": list(answer.reasons),
            "allow_approx": list(answer.approximations) if answer.is_possible else None,
        }
        for answer in answers
    ]
    lines = []
    for answer in answers:
        exact = "exact" if answer.exact else "not exact"
        lines.append(f"{answer.target:<18} {exact:<10} {targets[answer.target].summary}")
        lines += [f"  {reason}" for reason in answer.reasons]
        if answer.approximations and answer.is_possible:
            lines.append(f"  --allow-approx={','.join(answer.approximations)} accepts that")
    _show(args, rows, lines)
    return OK


_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "export": _export,
    "import": _import,
    "verify": _verify,
    "inspect": _inspect,
    "diff": _diff,
    "targets": _targets,
}


def _show(args: argparse.Namespace, value: Any, lines: Sequence[str]) -> None:
    try:
        print(json.dumps(value, indent=2) if args.json else "\n".join(lines), flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise StorageError(
            f"standard output cannot be written ({error}); the command itself did its work"
        ) from error


def _say(notes: Sequence[str]) -> None:
    for note in notes:
        print(note, file=sys.stderr, flush=True)


def _first(problems: Sequence[str], limit: int = 10) -> list[str]:
    more = [f"  and {len(problems) - limit} more"] if len(problems) > limit else []
    return [f"  {problem}" for problem in problems[1:limit]] + more


if __name__ == "__main__":
    sys.exit(main())
