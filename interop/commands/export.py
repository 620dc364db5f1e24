"""Export: from a run, or any source, to a target, without a model, a mesh or a device.

`plan` says what would happen from metadata alone; `export_checkpoint` does it. The output is
written beside its place, read back and compared bit for bit, and only then renamed.
"""

import collections
import dataclasses
import importlib
import importlib.metadata
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from craft_jax import outputs
from craft_jax.data.tokenizers import Tokenizer
from craft_jax.errors import UsageError
from interop.craft import tokenizers
from interop.errors import ParityError, listed
from interop.files import atomic, hugging_face
from interop.files.safetensors import SafetensorsWriter
from interop.files.torch_writer import Placeholder, TorchFileWriter
from interop.files.weights import INDEX, index_json, parse_size, plan_shards
from interop.mapping import dtypes, folds, pipeline
from interop.mapping.spec import Spec
from interop.mapping.table import Mapping as Rules
from interop.mapping.tensors import Abstract
from interop.sources import source
from interop.sources.source import MANIFEST, Options, Source
from interop.targets.base import FILES, Allowed, Facts
from interop.targets.registry import Target, choose

logger = logging.getLogger(__name__)

MANIFEST_VERSION = 1
PROBE_LIMIT = 200_000_000
"""Parameters up to which `--probe auto` computes a probe."""

_SHARD_SIZE = "5GB"
_MODELING = Path(__file__).parents[1] / "pytorch" / "modeling_craft.py"
_VERIFY = ("none", "bits", "logits")
_PROBE = ("auto", "none", "always")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What an export will do; made from metadata alone.

    Attributes:
      source: the model, with dtype and rows as they will be written.
      target: where it goes.
      spec: what the target will hold.
      rules: from leaves to tensors.
      tensors: what will be written, by name, in order.
      approximations: what changes, reason by name; empty for an exact export.
      trimmed: rows that are left out, or None.
      tokenizer: or None.
      dtype: as it was asked for.
      max_shard_size: in bytes.
      budget: bytes under way at once.
    """

    source: Source
    target: Target
    spec: Spec
    rules: Rules
    tensors: dict[str, Abstract]
    approximations: Mapping[str, str]
    trimmed: Mapping[str, Any] | None
    tokenizer: Tokenizer | None
    dtype: str
    max_shard_size: int
    budget: int

    @property
    def is_exact(self) -> bool:
        """Whether every bit and every number survives."""
        return not self.approximations and self.dtype == "keep" and self.trimmed is None

    @property
    def stored(self) -> dict[str, Abstract]:
        """The tensors that take room in the file: of tied names, the first."""
        names = [one.targets[0] for one in self.rules.rules]
        return {name: self.tensors[name] for name in names}

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors in the output."""
        return sum(tensor.nbytes for tensor in self.stored.values())

    @property
    def peak_bytes(self) -> int:
        """An estimate of the arrays in memory at once."""
        per_rule = [
            2 * sum(self.source.leaves[name].nbytes for name in one.sources)
            for one in self.rules.rules
        ]
        return max(min(self.budget, sum(per_rule)), *per_rule)

    def to_json(self) -> dict[str, Any]:
        """Returns the plan as plain JSON."""
        return {
            "source": str(self.source.path),
            "step": self.source.step,
            "target": self.target.name,
            "exact": self.is_exact,
            "approximations": dict(self.approximations),
            "synthetic": list(self.rules.synthetic),
            "trimmed_rows": (self.trimmed or {}).get("rows", 0),
            "dtype": self.dtype,
            "tokenizer": self.tokenizer is not None,
            "parameters": self.source.num_params,
            "bytes": self.num_bytes,
            "peak_bytes": self.peak_bytes,
            "warnings": list(self.source.notes),
            "tensors": {
                name: {
                    "dtype": tensor.dtype.name,
                    "shape": list(tensor.shape),
                    "from": list(self.rules.rule_of[name].sources),
                }
                for name, tensor in self.tensors.items()
            },
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exported:
    """What an export did.

    Attributes:
      out: where the model is now.
      plan: what was planned.
      manifest: what was recorded beside it.
      notes: what else is worth knowing.
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


def plan(
    ckpt: "str | Path | Source",
    target: str = "auto",
    *,
    family: str | None = None,
    dtype: str = "keep",
    max_shard_size: str | int = _SHARD_SIZE,
    max_memory: str | int | None = None,
    tokenizer: str | Path | None = None,
    trim_vocab: bool = False,
    allow_approx: Any = None,
    options: Options | None = None,
) -> Plan:
    """Plans an export; reads configs and headers, and no array.

    Args:
      ckpt: a run, a checkpoint, or anything else that `open_source` opens.
      target: the name of a target, `hf`, or `auto`.
      family: of Hugging Face, such as `gpt2`; None for the best.
      dtype: keep, fp32, bf16, fp16 or fp64.
      max_shard_size: bytes of tensors in a safetensors file, such as `5GB`.
      max_memory: bytes of arrays under way at once.
      tokenizer: a folder or file that takes the place of the run's; `none` for none.
      trim_vocab: leave out embedding rows that stand for no token.
      allow_approx: True, or names; see docs/interop.md.
      options: how to read a foreign source.

    Raises:
      UsageError, InteropError: it cannot be done; nothing was written.
    """
    opened = ckpt if isinstance(ckpt, Source) else source.open_source(ckpt, options)
    if opened.kind == source.CRAFT and options is not None:
        options.check_unused(str(ckpt))
    opened = dataclasses.replace(opened, tokenizer=source.tokenizer_of(opened, tokenizer))
    cut = None
    if trim_vocab:
        opened, cut = source.trimmed(opened)
    opened = source.with_dtype(opened, dtypes.named(dtype))
    allowed = Allowed.of(allow_approx)
    chosen = choose(opened.spec, target, family, allowed)
    reading = chosen.fit(opened.spec, allowed)
    if reading.spec != opened.spec:
        found = folds.towards(opened.spec, opened.leaves, reading.spec)
        opened = dataclasses.replace(opened, spec=reading.spec, leaves=found)
    rules = chosen.mapping(reading.spec)
    if chosen.container in FILES and max_shard_size != _SHARD_SIZE:
        raise UsageError(f"--max-shard-size={max_shard_size}: {chosen.name} is one file")
    return Plan(
        source=opened,
        target=chosen,
        spec=reading.spec,
        rules=rules,
        tensors=rules.shapes(opened.leaves),
        approximations=reading.approximations,
        trimmed=cut,
        tokenizer=opened.tokenizer,
        dtype=dtype,
        max_shard_size=_size("--max-shard-size", max_shard_size),
        budget=memory_size(max_memory),
    )


def memory_size(max_memory: str | int | None) -> int:
    """Returns the bytes that `--max-memory` names; the default for None.

    Raises:
      UsageError: it names none.
    """
    return _size("--max-memory", max_memory or pipeline.DEFAULT_BUDGET)


def _size(flag: str, size: str | int) -> int:
    try:
        return parse_size(size)
    except ValueError as error:
        raise UsageError(f"{flag}: {error}") from None


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
    **planned: Any,
) -> Exported:
    """Exports a checkpoint; see `plan` for the arguments that are not here.

    Args:
      ckpt: a run, a checkpoint, or anything else that `open_source` opens.
      out: the folder or, for nanogpt, torch-... and craft-..., the file to make.
      target: the name of a target, `hf`, or `auto`.
      overwrite: take the place of what is there, in one step.
      verify: none, bits (read back and compared), or logits (also computed in float64 by both).
      probe: auto (up to 200M parameters), none or always: whether the folder can prove itself.
      workers: threads.
      strict_finite: refuse NaN and infinities instead of counting them.
      **planned: see `plan`.

    Raises:
      UsageError, InteropError: refused or failed; `out` is as it was.
    """
    _one_of("--verify", verify, _VERIFY)
    _one_of("--probe", probe, _PROBE)
    out = Path(out).expanduser()
    made = plan(ckpt, target, **planned)
    is_file = made.target.container in FILES
    inputs = [made.source.path] if made.source.path.exists() else []
    atomic.check_place(out, inputs, overwrite, is_folder=not is_file)
    wants_probe = probe == "always" or (probe == "auto" and made.source.num_params <= PROBE_LIMIT)
    notes = [*made.source.notes, *_remarks(made)]
    if is_file and probe == "always":
        raise UsageError(f"--probe always: {made.target.name} is one file, which carries no probe")
    with atomic.output(out, overwrite=overwrite, num_bytes=made.num_bytes) as place:
        record = _Record(made)
        if is_file:
            _write_file(made, place, record, workers, verify)
        else:
            place.mkdir()
            _write_folder(made, place, record, workers)
        notes += dtypes.nonfinite_notes(record.nonfinite, strict_finite)
        if verify != "none":
            _read_back(made, place, record, workers)
        if wants_probe and not is_file:
            importlib.import_module("interop.commands.probe").write(made, place)
        manifest = record.manifest(
            verified=verify, probe=wants_probe and not is_file, notes=tuple(notes)
        )
        if not is_file:
            outputs.write_json(place / MANIFEST, manifest)
        if verify == "logits":
            module = importlib.import_module("interop.commands.verify")
            held = dataclasses.replace(made.source, spec=made.spec)
            report = module.compare(held, _reopened(place, made), level="logits")
            if not report.passed:
                raise ParityError(f"{out} was not written: {report.summary}")
    return Exported(out=out, plan=made, manifest=manifest, notes=tuple(notes))


def _one_of(flag: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UsageError(f"{flag}={value} is not one of {', '.join(choices)}")


def _remarks(made: Plan) -> list[str]:
    found = [f"{name}: {reason}" for name, reason in made.approximations.items()]
    if made.source.images is not None:
        if made.source.images.palette and made.target.container != "craft-torch":
            found.append(
                f"images: a {made.target.name} model knows no palette; it is in {MANIFEST}"
            )
    elif made.tokenizer is None:
        found.append("tokenizer: the run has none, so none is written")
    elif made.target.container in FILES and not _facts(made).vocabulary:
        found.append(
            f"tokenizer: a {made.target.name} file does not hold it; give it again with "
            "--tokenizer on import"
        )
    if made.rules.synthetic:
        found.append(
            f"zeros: {len(made.rules.synthetic)} tensors that {made.target.name} demands and the "
            "model does not have"
        )
    return found


class _Record:
    """Collects digests and oddities while tensors are written."""

    def __init__(self, made: Plan):
        self._made = made
        self.digests: dict[str, str] = {}
        self.canonical: dict[str, str] = {}
        self.nonfinite: dict[str, int] = {}

    def add(self, done: pipeline.Done) -> None:
        self.digests |= done.digests
        self.canonical |= done.canonical
        self.nonfinite |= done.nonfinite

    def manifest(self, *, verified: str, probe: bool, notes: tuple[str, ...]) -> dict[str, Any]:
        made = self._made
        canonical = {
            name: {
                "dtype": leaf.dtype.name,
                "shape": list(leaf.shape),
                "sha256": self.canonical[name],
            }
            for name, leaf in made.source.leaves.items()
        }
        return {
            "format": "craft_jax interop",
            "version": MANIFEST_VERSION,
            "source": {"run": made.source.run, "step": made.source.step},
            "target": made.target.name,
            "spec": dataclasses.asdict(made.spec),
            "images": made.source.images.to_json() if made.source.images else None,
            "exact": made.is_exact,
            "approximations": dict(made.approximations),
            "dtype": made.dtype,
            "trimmed": made.trimmed,
            "synthetic": list(made.rules.synthetic),
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
                for name, tensor in made.tensors.items()
            },
            "canonical": canonical,
        }


def model_digest(canonical: Mapping[str, str]) -> str:
    """Returns one digest of all leaves, whatever form the model is in."""
    return dtypes.digest_text("".join(f"{name} {canonical[name]}\n" for name in sorted(canonical)))


def _write_folder(made: Plan, place: Path, record: _Record, workers: int | None) -> None:
    shards = plan_shards(made.stored, made.max_shard_size)
    home = {name: shard.file for shard in shards for name in shard.names}
    writers: dict[str, SafetensorsWriter] = {}
    pending = collections.Counter(home.values())
    try:
        for shard in shards:
            tensors = {name: made.stored[name] for name in shard.names}
            writers[shard.file] = SafetensorsWriter(place / shard.file, tensors, {"format": "pt"})
        for done in pipeline.forward(
            made.rules, made.source.leaves, workers=workers, budget=made.budget
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
        outputs.write_json(place / INDEX, index_json(shards, made.stored))
    _write_configs(made, place)


def _write_configs(made: Plan, place: Path) -> None:
    architecture = made.target.write_config(made.spec)
    config = hugging_face.config(architecture, made.tensors, made.tokenizer)
    if made.target.container == "craft-torch":
        images = made.source.images
        config["tokenizer_vocab_size"] = made.tokenizer.vocab_size if made.tokenizer else None
        if images is not None:
            config["images"] = images.to_json()
            config["tokenizer_vocab_size"] = images.num_colors or None
        for name in ("bos_token_id", "pad_token_id"):
            del config[name]
        (place / _MODELING.name).write_bytes(_MODELING.read_bytes())
    else:
        generation = hugging_face.generation_config(made.tokenizer, made.spec.vocab_size)
        outputs.write_json(place / hugging_face.GENERATION, generation)
    outputs.write_json(place / hugging_face.CONFIG, config)
    if made.tokenizer:
        hugging_face.write_tokenizer(place, made.tokenizer, made.spec.max_seq_len)


def _write_file(made: Plan, place: Path, record: _Record, workers: int | None, verify: str) -> None:
    key = {name: one.targets[0] for one in made.rules.rules for name in one.targets}
    tensors = collections.OrderedDict(
        (name, Placeholder(key[name], tensor)) for name, tensor in made.tensors.items()
    )
    value = made.target.contents(tensors, made.spec, _facts(made))
    with TorchFileWriter(place, value) as writer:
        for done in pipeline.forward(
            made.rules, made.source.leaves, workers=workers, budget=made.budget
        ):
            record.add(done)
            for name, array in done.arrays.items():
                if key[name] == name:
                    writer.write(name, array)
        manifest = record.manifest(verified=verify, probe=False, notes=())
        writer.add_record(MANIFEST, json.dumps(manifest).encode())
        writer.close()


def _facts(made: Plan) -> Facts:
    """Returns what a file may tell beside the model."""
    val_loss = made.source.metrics.get("val_loss")
    facts = Facts(step=made.source.step, val_loss=None if val_loss is None else float(val_loss))
    if made.target.container != "craft" or made.tokenizer is None:
        return facts
    vocabulary = tokenizers.vocabulary_of(made.tokenizer)
    special = tokenizers.special_of(made.tokenizer) or {}
    return dataclasses.replace(facts, vocabulary=vocabulary, special_tokens=special)


def _reopened(place: Path, made: Plan) -> Source:
    recorded = {"synthetic": list(made.rules.synthetic), "spec": dataclasses.asdict(made.spec)}
    return source.open_source(place, Options(kind=made.target.name, recorded=recorded))


def _read_back(made: Plan, place: Path, record: _Record, workers: int | None) -> None:
    """Compares what stands in the files with what was read, by digests of the leaves.

    Raises:
      ParityError: they differ; names the leaves.
    """
    again = _reopened(place, made)
    if differences := made.spec.differences(again.spec):
        raise ParityError(f"the written config says something else: {'; '.join(differences)}")
    found = pipeline.digests(again.leaves, workers=workers, budget=made.budget)
    wrong = [name for name, digest in record.canonical.items() if found.get(name) != digest]
    if wrong:
        raise ParityError(
            f"{len(wrong)} tensors read back from the files differ from the source: {listed(wrong)}"
        )


def save_pretrained(
    model: Any, out_dir: str | Path, *, target: str = "auto", **options: Any
) -> Exported:
    """Exports a model object, a run, or a checkpoint: see `export_checkpoint`.

    Args:
      model: a path, a `craft_jax.runs.Run`, or a model of craft_jax with its parameters.
      out_dir: what to make.
      target: the name of a target, `hf`, or `auto`.
      **options: see `export_checkpoint` and `plan`.
    """
    return export_checkpoint(as_source(model), out_dir, target, **options)


def as_source(model: Any) -> "str | Path | Source":
    """Returns what can be exported from a path, a `Run`, or a model object."""
    if isinstance(model, (str, Path, Source)):
        return model
    if hasattr(model, "paths") and hasattr(model, "step"):
        return model.paths.checkpoints / str(model.step)
    return importlib.import_module("interop.sources.live").source_of(model)
