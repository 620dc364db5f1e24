"""Export: writes a run, or any other source, for a target, without a model, a mesh or a device.

`plan` works out the output from metadata alone; `export_checkpoint` writes it. The output is
written under a temporary name, read back, compared bit for bit, and only then renamed.
"""

import argparse
import collections
import dataclasses
import importlib
import importlib.metadata
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from craft_jax import outputs
from craft_jax.errors import UsageError
from interop.commands import Result, add_writing, path
from interop.commands.plan import Plan, as_source, plan
from interop.commands.reading import add_reading, reading_options
from interop.craft import tokenizers
from interop.errors import ParityError, listed
from interop.files import atomic, hugging_face
from interop.files.safetensors import SafetensorsWriter
from interop.files.shards import INDEX, index_json, plan_shards
from interop.files.torch_writer import Placeholder, TorchFileWriter
from interop.mapping import dtypes, pipeline
from interop.sources import opening
from interop.sources.manifest import MANIFEST
from interop.sources.source import Options, Source
from interop.targets.base import FILES, Facts

MANIFEST_VERSION = 1

PROBE_LIMIT = 200_000_000
"""Parameters up to which `probe=auto` computes a probe."""

_MODELING = Path(__file__).parents[1] / "pytorch" / "modeling_craft.py"

_VERIFY = ("none", "bits", "logits")

PROBE = ("auto", "none", "always")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exported:
    """The result of an export.

    Attributes:
      out: the file or folder that was written.
      plan: the plan that was carried out.
      manifest: the record beside the model.
      notes: remarks for the user, one line each.
    """

    out: Path
    plan: Plan
    manifest: Mapping[str, Any]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns a summary as plain JSON."""
        return {
            "out": str(self.out),
            "target": self.plan.target.name,
            "exact": self.plan.is_exact,
            "approximations": dict(self.plan.approximations),
            "bytes": self.plan.num_bytes,
            "parameters": self.plan.source.num_params,
            "model_sha256": self.manifest["model_sha256"],
            "verified": self.manifest["verified"],
            "probe": self.manifest["probe"],
            "notes": list(self.notes),
        }


def export_checkpoint(
    ckpt: "str | Path | Source",
    out: str | Path,
    target: str = "auto",
    *,
    overwrite: bool = False,
    verify: str = "bits",
    probe: str = "auto",
    workers: int | None = None,
    strict_finite: bool = False,
    **plan_options: Any,
) -> Exported:
    """Exports a checkpoint.

    Args:
      ckpt: a run, a checkpoint, or anything else that `open_source` opens.
      out: the folder or, for nanogpt, torch-... and craft-..., the file to make.
      target: the name of a target, `hf`, or `auto`.
      overwrite: replace an earlier output, in one step.
      verify: none, bits (read back and compare), or logits (also compare float64 logits).
      probe: auto (up to 200M parameters), none or always: whether the folder
        gets `probe.json` and `verify.py`.
      workers: threads.
      strict_finite: refuse NaN and infinities instead of counting them.
      **plan_options: see `plan`.

    Raises:
      UsageError, InteropError: refused or failed; `out` is as it was.
    """
    check_choice("verify", verify, _VERIFY)
    check_choice("probe", probe, PROBE)
    out = Path(out).expanduser()
    planned = plan(ckpt, target, **plan_options)
    is_file = planned.target.container in FILES
    inputs = [planned.source.path] if planned.source.path.exists() else []
    atomic.check_place(out, inputs, overwrite, is_folder=not is_file)
    if is_file and probe == "always":
        raise UsageError(f"`probe=always`: {planned.target.name} is one file, which holds no probe")
    has_probe = not is_file and _is_wanted(probe, planned)
    notes = [*planned.source.notes, *_remarks(planned)]
    with atomic.output(out, overwrite=overwrite, num_bytes=planned.num_bytes) as place:
        record = _Record(planned)
        if is_file:
            _write_file(planned, place, record, workers, verify)
        else:
            place.mkdir()
            _write_folder(planned, place, record, workers)
        notes += dtypes.nonfinite_notes(record.nonfinite, strict_finite)
        if verify != "none":
            _read_back(planned, place, record, workers)
        if has_probe:
            importlib.import_module("interop.commands.probe").write(planned, place)
        manifest = record.manifest(verified=verify, probe=has_probe, notes=tuple(notes))
        if not is_file:
            outputs.write_json(place / MANIFEST, manifest)
        if verify == "logits":
            _compare_logits(planned, place, out)
    return Exported(out=out, plan=planned, manifest=manifest, notes=tuple(notes))


def _is_wanted(probe: str, planned: Plan) -> bool:
    return probe == "always" or (probe == "auto" and planned.source.num_params <= PROBE_LIMIT)


def check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises UsageError if an option has a value that is not one of its choices."""
    if value not in choices:
        raise UsageError(f"`{option}={value}` is not one of {', '.join(choices)}")


def _remarks(planned: Plan) -> list[str]:
    found = [f"{name}: {reason}" for name, reason in planned.approximations.items()]
    if planned.source.images is not None:
        if planned.source.images.palette and planned.target.container != "craft-torch":
            found.append(
                f"images: a {planned.target.name} model knows no palette; it is in {MANIFEST}"
            )
    elif planned.tokenizer is None:
        found.append("tokenizer: the run has none, so none is written")
    elif planned.target.container in FILES and not _facts(planned).vocabulary:
        found.append(
            f"tokenizer: a {planned.target.name} file does not hold it; give it again with "
            "--tokenizer on import"
        )
    if planned.rules.synthetic:
        found.append(
            f"zeros: {len(planned.rules.synthetic)} tensors that {planned.target.name} demands and "
            "the model does not have"
        )
    return found


class _Record:
    """Collects digests and counts of non-finite values while tensors are written."""

    def __init__(self, planned: Plan):
        self._planned = planned
        self.digests: dict[str, str] = {}
        self.canonical: dict[str, str] = {}
        self.nonfinite: dict[str, int] = {}

    def add(self, done: pipeline.Done) -> None:
        self.digests |= done.digests
        self.canonical |= done.canonical
        self.nonfinite |= done.nonfinite

    def manifest(self, *, verified: str, probe: bool, notes: tuple[str, ...]) -> dict[str, Any]:
        planned = self._planned
        canonical = {
            name: {
                "dtype": leaf.dtype.name,
                "shape": list(leaf.shape),
                "sha256": self.canonical[name],
            }
            for name, leaf in planned.source.leaves.items()
        }
        return {
            "format": "craft_jax interop",
            "version": MANIFEST_VERSION,
            "source": {"run": planned.source.run, "step": planned.source.step},
            "target": planned.target.name,
            "spec": dataclasses.asdict(planned.spec),
            "images": planned.source.images.to_json() if planned.source.images else None,
            "exact": planned.is_exact,
            "approximations": dict(planned.approximations),
            "dtype": planned.dtype,
            "trimmed": planned.trimmed,
            "synthetic": list(planned.rules.synthetic),
            "verified": verified,
            "probe": probe,
            "notes": list(notes),
            "model_sha256": model_digest(self.canonical),
            "tensors": {
                name: {
                    "dtype": tensor.dtype.name,
                    "shape": list(tensor.shape),
                    "sha256": self.digests[name],
                }
                for name, tensor in planned.tensors.items()
            },
            "canonical": canonical,
        }


def model_digest(canonical: Mapping[str, str]) -> str:
    """Returns one digest of all leaves, independent of the form that the model is in."""
    return dtypes.digest_text("".join(f"{name} {canonical[name]}\n" for name in sorted(canonical)))


def _write_folder(planned: Plan, place: Path, record: _Record, workers: int | None) -> None:
    shards = plan_shards(planned.stored, planned.max_shard_size)
    home = {name: shard.file for shard in shards for name in shard.names}
    writers: dict[str, SafetensorsWriter] = {}
    pending = collections.Counter(home.values())
    try:
        for shard in shards:
            tensors = {name: planned.stored[name] for name in shard.names}
            writers[shard.file] = SafetensorsWriter(place / shard.file, tensors, {"format": "pt"})
        for done in pipeline.forward(
            planned.rules, planned.source.leaves, workers=workers, budget=planned.budget
        ):
            record.add(done)
            for name, array in done.arrays.items():
                if name in home:
                    file = home[name]
                    writers[file].write(name, array)
                    pending[file] -= 1
                    if not pending[file]:
                        writers.pop(file).close()
    except BaseException:
        for writer in writers.values():
            writer.abort()
        raise
    if len(shards) > 1:
        outputs.write_json(place / INDEX, index_json(shards, planned.stored))
    _write_configs(planned, place)


def _write_configs(planned: Plan, place: Path) -> None:
    architecture = planned.target.write_config(planned.spec)
    config = hugging_face.config(architecture, planned.tensors, planned.tokenizer)
    if planned.target.container == "craft-torch":
        images = planned.source.images
        config["tokenizer_vocab_size"] = planned.tokenizer.vocab_size if planned.tokenizer else None
        if images is not None:
            config["images"] = images.to_json()
            config["tokenizer_vocab_size"] = images.num_colors or None
        for name in ("bos_token_id", "pad_token_id"):
            del config[name]
        (place / _MODELING.name).write_bytes(_MODELING.read_bytes())
    else:
        generation = hugging_face.generation_config(planned.tokenizer, planned.spec.vocab_size)
        outputs.write_json(place / hugging_face.GENERATION, generation)
    outputs.write_json(place / hugging_face.CONFIG, config)
    if planned.tokenizer:
        hugging_face.write_tokenizer(place, planned.tokenizer, planned.spec.max_seq_len)


def _write_file(
    planned: Plan, place: Path, record: _Record, workers: int | None, verify: str
) -> None:
    key = {name: one.targets[0] for one in planned.rules.rules for name in one.targets}
    tensors = collections.OrderedDict(
        (name, Placeholder(key[name], tensor)) for name, tensor in planned.tensors.items()
    )
    value = planned.target.contents(tensors, planned.spec, _facts(planned))
    with TorchFileWriter(place, value) as writer:
        for done in pipeline.forward(
            planned.rules, planned.source.leaves, workers=workers, budget=planned.budget
        ):
            record.add(done)
            for name, array in done.arrays.items():
                if key[name] == name:
                    writer.write(name, array)
        manifest = record.manifest(verified=verify, probe=False, notes=())
        writer.add_record(MANIFEST, json.dumps(manifest).encode())
        writer.close()


def _facts(planned: Plan) -> Facts:
    """Returns the facts that a checkpoint file records beside the model."""
    val_loss = planned.source.metrics.get("val_loss")
    facts = Facts(step=planned.source.step, val_loss=None if val_loss is None else float(val_loss))
    if planned.target.container != "craft" or planned.tokenizer is None:
        return facts
    vocabulary = tokenizers.vocabulary_of(planned.tokenizer)
    special = tokenizers.special_of(planned.tokenizer) or {}
    return dataclasses.replace(facts, vocabulary=vocabulary, special_tokens=special)


def _reopened(place: Path, planned: Plan) -> Source:
    recorded = {
        "synthetic": list(planned.rules.synthetic),
        "spec": dataclasses.asdict(planned.spec),
    }
    return opening.open_source(place, Options(kind=planned.target.name, recorded=recorded))


def _read_back(planned: Plan, place: Path, record: _Record, workers: int | None) -> None:
    """Compares the written files with the source, by digests of the leaves.

    Raises:
      ParityError: they differ; names the leaves.
    """
    again = _reopened(place, planned)
    if differences := planned.spec.differences(again.spec):
        raise ParityError(f"the written config differs from the model: {'; '.join(differences)}")
    found = pipeline.digests(again.leaves, workers=workers, budget=planned.budget)
    wrong = [name for name, digest in record.canonical.items() if found.get(name) != digest]
    if wrong:
        raise ParityError(
            f"{len(wrong)} tensors read back from the files differ from the source: {listed(wrong)}"
        )


def _compare_logits(planned: Plan, place: Path, out: Path) -> None:
    """Compares the source's float64 logits with those of PyTorch for the written files.

    Raises:
      ParityError: they differ.
    """
    module = importlib.import_module("interop.commands.verify")
    held = dataclasses.replace(planned.source, spec=planned.spec)
    report = module.compare(held, _reopened(place, planned), level="logits")
    if not report.passed:
        raise ParityError(f"{out} was not written: {report.summary}")


def save_pretrained(
    model: Any, out_dir: str | Path, *, target: str = "auto", **options: Any
) -> Exported:
    """Exports a model object, a run, or a checkpoint: see `export_checkpoint`.

    Args:
      model: a path, a `craft_jax.runs.Run`, or a model of craft_jax with its parameters.
      out_dir: the output.
      target: the name of a target, `hf`, or `auto`.
      **options: see `export_checkpoint` and `plan`.
    """
    return export_checkpoint(as_source(model), out_dir, target, **options)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    add = parser.add_argument
    add("ckpt", type=path, help="a run, or one of its checkpoints")
    add("out", type=path, help="the folder to make; the file for nanogpt, torch-... and craft")
    add("--to", default="auto", help="auto (default), hf, craft, or a target: see `targets`")
    add("--family", help="of Hugging Face: gpt2, biogpt or opt")
    add("--max-shard-size", default="5GB", help="of a safetensors file (default: 5GB)")
    add("--trim-vocab", action="store_true", help="leave out rows that stand for no token")
    add("--dry-run", action="store_true", help="show what would be written, and write nothing")
    add_writing(parser)
    add("--verify", default="bits", help="none, bits (default) or logits")
    add_reading(parser)


def run(args: argparse.Namespace) -> Result:
    """Runs the command."""
    plan_options = {
        "family": args.family,
        "dtype": args.dtype,
        "max_shard_size": args.max_shard_size,
        "max_memory": args.max_memory,
        "tokenizer": args.tokenizer,
        "trim_vocab": args.trim_vocab,
        "allow_approx": args.allow_approx,
        "options": reading_options(args),
    }
    if args.dry_run:
        planned = plan(args.ckpt, args.to, **plan_options)
        return Result(planned.to_json(), _plan_lines(planned))
    done = export_checkpoint(
        args.ckpt,
        args.out,
        args.to,
        overwrite=args.overwrite,
        verify=args.verify,
        probe=args.probe,
        workers=args.workers,
        strict_finite=args.strict_finite,
        **plan_options,
    )
    return Result(done.to_json(), _export_lines(done), tuple(done.notes))


def _export_lines(done: Exported) -> list[str]:
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


def _plan_lines(plan: Plan) -> list[str]:
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
