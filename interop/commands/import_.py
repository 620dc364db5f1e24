"""Import: from a file or folder of any target to a run of craft_jax.

The run has one checkpoint, of step 0, with weights alone; `evaluate`, `generate` and `train` work
on it, and `--config.init_from` begins a new run with it. Needs JAX, since Orbax writes it.
"""

import argparse
import dataclasses
import importlib
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from craft_jax import outputs
from craft_jax.checkpoint.listing import PARAMS, Checkpoints
from craft_jax.checkpoint.store import CheckpointStore
from craft_jax.errors import StorageError, UsageError
from interop import commands
from interop.commands import Result
from interop.commands.export import PROBE, PROBE_LIMIT, check_choice, model_digest
from interop.commands.plan import memory_size
from interop.commands.reading import add_reading, reading_options
from interop.errors import DiskSpaceError, ParityError, listed
from interop.files import atomic, orbax
from interop.mapping import dtypes, pipeline
from interop.mapping.tensors import LazyTensor, Tensors
from interop.sources import live, opening, source
from interop.sources.source import CRAFT, Options, Source


@dataclasses.dataclass(frozen=True, kw_only=True)
class Imported:
    """The result of an import.

    Attributes:
      out: the folder of the run.
      source: the imported model.
      model_sha256: one digest of all leaves; None without verification.
      probe: number of logits of the source's probe that agreed; None if not compared.
      notes: remarks for the user, one line each.
    """

    out: Path
    source: Source
    model_sha256: str | None
    probe: int | None
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns a summary as plain JSON."""
        return {
            "out": str(self.out),
            "source": str(self.source.path),
            "kind": self.source.kind,
            "parameters": self.source.num_params,
            "tokenizer": self.source.tokenizer is not None,
            "model_sha256": self.model_sha256,
            "probe": self.probe,
            "notes": list(self.notes),
        }


def import_checkpoint(
    path: str | Path,
    out: str | Path,
    *,
    options: Options | None = None,
    dtype: str = "keep",
    tokenizer: str | Path | None = None,
    overwrite: bool = False,
    verify: str = "bits",
    probe: str = "auto",
    strict_finite: bool = False,
    workers: int | None = None,
    max_memory: int | None = None,
) -> Imported:
    """Makes a run of a model in another form.

    Args:
      path: a Hugging Face folder, a craft-torch folder, a nanoGPT checkpoint, or bare tensors.
      out: the folder of the run, `outputs/models/NAME`.
      options: how to read the source.
      dtype: keep, fp32, bf16, fp16 or fp64.
      tokenizer: a folder or file that replaces the source's; `none` for none.
      overwrite: replace an earlier run.
      verify: none, or bits: read the checkpoint back and compare.
      probe: auto (up to 200M parameters), none or always: compute the logits that the source's
        `probe.json` records, and compare.
      strict_finite: refuse NaN and infinities instead of counting them.
      workers: threads.
      max_memory: bytes of arrays in flight at once.

    Raises:
      UsageError, InteropError: refused or failed; `out` is as it was.
    """
    check_choice("verify", verify, ("none", "bits"))
    check_choice("probe", probe, PROBE)
    out = Path(out).expanduser()
    outputs.check_name(out.name)
    opened = _opened(path, options, dtype, tokenizer)
    atomic.check_place(out, [opened.path], overwrite)
    survey = pipeline.survey(
        opened.leaves, digests=verify == "bits", workers=workers, budget=max_memory
    )
    notes = [*_remarks(opened), *dtypes.nonfinite_notes(survey.nonfinite, strict_finite)]
    num_bytes = sum(leaf.nbytes for leaf in opened.leaves.values())
    with atomic.output(out, overwrite=overwrite, num_bytes=num_bytes) as place:
        write_run(opened, out, place, spill=dtype != "keep")
        sha256 = None
        if verify == "bits":
            _read_back(opened, place, survey.digests, workers, max_memory)
            sha256 = model_digest(survey.digests)
            notes += _changed_since(opened, survey.digests)
        compared = _compare_probe(opened, probe)
    return Imported(out=out, source=opened, model_sha256=sha256, probe=compared, notes=tuple(notes))


def _opened(
    path: str | Path, options: Options | None, dtype: str, tokenizer: str | Path | None
) -> Source:
    """Opens the source, with the tokenizer and the dtype that the run will have.

    Raises:
      UsageError, InteropError: it is a run already, or cannot be read.
    """
    opened = opening.open_source(path, options)
    if opened.kind == CRAFT:
        raise UsageError(
            f"{path} is a run of craft_jax already; begin a new run with its weights by "
            f"--config.init_from={path}"
        )
    opened = dataclasses.replace(opened, tokenizer=opening.tokenizer_of(opened, tokenizer))
    return source.with_dtype(opened, dtypes.named(dtype))


def _remarks(opened: Source) -> list[str]:
    found = [*opened.notes, *(f"{n}: {reason}" for n, reason in opened.approximations.items())]
    if opened.tokenizer is None and opened.images is None:
        found.append("tokenizer: the source has none; commands that read text need --tokenizer")
    return found


def write_run(opened: Source, out: Path, place: Path, spill: bool) -> None:
    """Writes the files of a run with one checkpoint.

    Args:
      opened: the model.
      out: the final folder of the run.
      place: the temporary folder to write to.
      spill: keep leaves that are computed, such as converted ones, on disk instead of in memory.

    Raises:
      DiskSpaceError: it could not be written.
    """
    paths = outputs.describe_run(out.absolute(), opened.spec.name)
    store = CheckpointStore(place / "checkpoints")
    tokenizer = opened.tokenizer
    copy = Checkpoints(paths.checkpoints).folder / "0" / "tokenizer.json"
    if images := opened.images:
        data = {
            "source": "images",
            "tokenizer": None,
            "image_size": images.height if images.height == images.width else None,
            "image_channels": images.channels,
            "image_colors": images.num_colors or None,
        }
    else:
        data = {"source": "files", "tokenizer": str(copy) if tokenizer else None}
    if opened.spec.is_of_tokens:
        data["seq_len"] = opened.spec.max_seq_len
    settings = live.settings_of(opened.spec.model_config(), data)
    meta = {
        "metrics": dict(opened.metrics),
        "vocab_size": opened.spec.vocab_size or None,
        "images": images.to_json() if images else None,
        "data_fingerprint": None,
        "imported": {"run": opened.run or out.name, "step": opened.step, "from": opened.kind},
    }
    scratch = place / "spill"
    try:
        place.mkdir()
        store.save_imported(
            0,
            _mapped(opened.leaves, scratch if spill else None),
            meta=meta,
            config=settings,
            tokenizer=tokenizer.json if tokenizer else None,
        )
    except StorageError as error:
        raise DiskSpaceError(str(error)) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    outputs.write_json(place / "config.json", settings)
    outputs.write_index(paths, place)


def _mapped(leaves: Tensors, scratch: Path | None) -> dict[str, np.ndarray]:
    """Returns all leaves as arrays whose memory is files: the source's own, or copies on disk."""
    if scratch is None:
        return {name: leaf.read() for name, leaf in leaves.items()}
    scratch.mkdir()
    return {name: _spilled(leaf, scratch / name) for name, leaf in leaves.items()}


def _spilled(leaf: LazyTensor, file: Path) -> np.ndarray:
    np.ascontiguousarray(leaf.read()).reshape(-1).view(np.uint8).tofile(file)
    return np.memmap(file, np.uint8, "r").view(leaf.dtype).reshape(leaf.shape)


def _changed_since(opened: Source, digests: Mapping[str, str]) -> list[str]:
    """Returns a warning if leaves differ from the digests in the source's manifest."""
    recorded = (opened.manifest or {}).get("canonical", {})
    names = [
        name
        for name, leaf in opened.leaves.items()
        if name in recorded
        and recorded[name].get("dtype") == leaf.dtype.name
        and recorded[name].get("sha256") != digests[name]
    ]
    if not names:
        return []
    return [
        f"warning: {len(names)} tensors are not those that interop_manifest.json recorded at the "
        f"export, so the weights were changed since: {listed(names)}"
    ]


def _read_back(
    opened: Source,
    place: Path,
    before: Mapping[str, str],
    workers: int | None,
    budget: int | None,
) -> None:
    """Compares the checkpoint with the digests of the source's leaves.

    Raises:
      ParityError: they differ; names the leaves.
    """
    written = orbax.read_params(place / "checkpoints" / "0" / PARAMS)
    after = pipeline.digests(written, workers=workers, budget=budget)
    wrong = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    wrong += [n for n, leaf in opened.leaves.items() if written[n].dtype != leaf.dtype]
    if wrong:
        raise ParityError(
            f"{len(wrong)} leaves read back from the checkpoint differ from the source: "
            + listed(wrong)
        )


def _compare_probe(opened: Source, probe: str) -> int | None:
    file = opened.path / "probe.json"
    if probe == "none" or (probe == "auto" and opened.num_params > PROBE_LIMIT):
        return None
    if not file.is_file():
        if probe == "always":
            raise UsageError(f"`probe=always`: {opened.path} has no probe.json")
        return None
    return importlib.import_module("interop.commands.probe").check(opened, file)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    add = parser.add_argument
    src = "a Hugging Face or craft-torch folder, a .pt or .safetensors file"
    add("src", type=commands.path, help=src)
    add("out", type=commands.path, help="the run to make, outputs/models/NAME")
    commands.add_writing(parser)
    add("--verify", default="bits", help="none or bits (default)")
    add_reading(parser)


def run(args: argparse.Namespace) -> Result:
    """Runs the command."""
    done = import_checkpoint(
        args.src,
        args.out,
        options=reading_options(args),
        dtype=args.dtype,
        tokenizer=args.tokenizer,
        overwrite=args.overwrite,
        verify=args.verify,
        probe=args.probe,
        strict_finite=args.strict_finite,
        workers=args.workers,
        max_memory=memory_size(args.max_memory),
    )
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
    return Result(done.to_json(), lines, tuple(done.notes))
