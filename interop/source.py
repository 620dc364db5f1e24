"""Opens a model wherever it lives: a run of craft_jax, or a file or folder of any target.

What comes out is a `Source`: what the model is, and its leaves by the names of craft_jax, to be
read one by one. Only headers and configs are read here.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from craft_jax import outputs
from craft_jax.data.tokenizers import Tokenizer
from craft_jax.errors import CraftError, UsageError
from craft_jax.outputs import Checkpoints
from interop import cast, hf_files
from interop.errors import (
    AmbiguousSourceError,
    CorruptFileError,
    InteropError,
    NotRepresentableError,
    ShapeMismatchError,
    UncommittedCheckpointError,
    UnknownArchitectureError,
    listed,
)
from interop.files import orbax
from interop.files.pickles import Stub
from interop.files.weights import Weights, open_weights
from interop.leaves import leaves
from interop.mapping import Mapping as Rules
from interop.names import cleaned
from interop.spec import ModelSpec
from interop.targets import TARGETS, Target
from interop.targets.base import Allowed
from interop.tensors import LazyTensor, Tensors

CRAFT = "craft_jax"
MANIFEST = "interop_manifest.json"
# Where training frameworks keep the weights inside a pickled checkpoint.
_STATE_DICTS = ("model", "state_dict", "model_state_dict", "module", "net")
_EMA = ("ema", "model_ema", "ema_state_dict", "ema_model")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What a person may say about a source.

    Attributes:
      kind: `auto`, or the name of a target; `hf` for a Hugging Face folder.
      num_heads: for tensors without a config.
      config: a config file for tensors without one.
      strip_prefix, ignore_keys: see `names.cleaned`.
      allow_approx: approximations, see `Allowed`.
      allow_globals: names that a pickle may mention; they become inert stubs.
      drop_zero_bias: read biases that are all zero as no biases.
    """

    kind: str = "auto"
    num_heads: int | None = None
    config: Path | None = None
    strip_prefix: str | None = None
    ignore_keys: tuple[str, ...] = ()
    allow_approx: Any = None
    allow_globals: tuple[str, ...] = ()
    drop_zero_bias: bool = False

    def __post_init__(self):
        if self.kind not in ("auto", "hf", *TARGETS):
            kinds = ", ".join(("auto", "hf", *TARGETS))
            raise UsageError(f"--from {self.kind} is not one of {kinds}")
        Allowed.of(self.allow_approx)

    def check_unused(self, place: str) -> None:
        """Checks that nothing is said about a source that is a run, which knows all of it itself.

        Raises:
          UsageError: something is.
        """
        default = Options()
        flags = {"kind": "--from", "num_heads": "--n-head", "allow_globals": "--allow-global"}
        said = [
            flags.get(field.name, "--" + field.name.replace("_", "-"))
            for field in dataclasses.fields(self)
            if field.name != "allow_approx"
            and getattr(self, field.name) != getattr(default, field.name)
        ]
        if said:
            raise UsageError(
                f"{', '.join(said)}: {place} is a run of craft_jax, which says all of that itself; "
                "leave it out"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A model, found.

    Attributes:
      path: where.
      run: the name of the run that the weights come from, as far as it is known.
      kind: `craft_jax`, or the name of the target that it is in the form of.
      spec: what it is.
      leaves: its parameters by the names of craft_jax; read when asked for.
      tokenizer: or None.
      step: updates made, where that is known.
      metrics: of the last evaluation, where they are known.
      rules: between leaves and `tensors`; None for a run.
      tensors: by the target's names; None for a run.
      manifest: what the export that wrote it recorded, if one did.
      approximations: what had to be crossed to read it, reason by name.
      notes: what else is worth knowing, one line each.
    """

    path: Path
    run: str | None = None
    kind: str
    spec: ModelSpec
    leaves: dict[str, LazyTensor]
    tokenizer: Tokenizer | None
    step: int = 0
    metrics: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    rules: Rules | None = None
    tensors: Tensors | None = None
    manifest: Mapping[str, Any] | None = None
    approximations: Mapping[str, str] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def num_params(self) -> int:
        """The number of parameters."""
        return sum(leaf.size for leaf in self.leaves.values())


def open_source(path: str | Path, options: Options | None = None) -> Source:
    """Opens a run, one of its checkpoints, a folder, or a file.

    Raises:
      InteropError: it is none of these, or cannot be read; see docs/interop.md for the cases.
    """
    place = Path(path).expanduser()
    if not place.exists():
        run = Path("outputs/models") / path
        hint = f"; did you mean {run}?" if run.exists() else ""
        raise CorruptFileError(f"{path}: no such file or folder{hint}")
    found = _run_folder(place)
    if found is not None:
        return _open_run(*found)
    if _looks_like_checkpoint(place):
        raise UncommittedCheckpointError(
            f"{place} is no finished checkpoint of a run; name the run's folder, or one of "
            "checkpoints/STEP in it"
        )
    return _open_foreign(place, options or Options())


# Runs of craft_jax.


def _run_folder(place: Path) -> tuple[Path, int | None] | None:
    """Returns the folder of a run, and the step if a checkpoint is named."""
    path = place.absolute()
    if (path / "run.json").is_file():
        return path, None
    if path.name.isdecimal() and (path.parent.parent / "run.json").is_file():
        return path.parent.parent, int(path.name)
    return None


def _looks_like_checkpoint(place: Path) -> bool:
    inside = ("_METADATA", "_CHECKPOINT_METADATA", "params", "optimizer", "checkpoints")
    return place.is_dir() and bool(
        any((place / name).exists() for name in inside) or re.match(r"\.\d+\.tmp-", place.name)
    )


def _open_run(folder: Path, step: int | None) -> Source:
    store = Checkpoints(outputs.open_run(folder).checkpoints)
    steps = store.steps()
    step = max(steps, default=None) if step is None else step
    if step is None or step not in steps:
        which = f"step {step}" if step is not None else "any step"
        have = f"; it has {', '.join(map(str, steps))}" if steps else ""
        raise UncommittedCheckpointError(
            f"run {folder} has no finished checkpoint of {which}{have}"
        )
    meta, config = store.meta(step), store.config(step)
    try:
        spec = ModelSpec.from_model_config(config["model"], meta["vocab_size"])
    except (TypeError, KeyError, AttributeError) as error:
        raise CorruptFileError(
            f"checkpoint {step} of {folder}: its config cannot be understood: {error!r}"
        ) from error
    tokenizer_file = store.tokenizer_file(step)
    found = orbax.read_params(store.params_folder(step))
    _check_layers(spec, len(found), folder)
    expected = leaves(spec)
    wrong = [
        f"{name} is {list(found[name].shape)}, not {list(want.shape)}"
        for name, want in expected.items()
        if name in found and found[name].shape != want.shape
    ]
    if wrong:
        raise ShapeMismatchError(f"checkpoint {step} of {folder}: {listed(wrong, '; ')}")
    # Weights that were imported and not trained since are still those of where they came from.
    origin = meta.get("imported") or {"run": folder.name, "step": step}
    return Source(
        path=folder,
        run=origin["run"],
        kind=CRAFT,
        spec=spec,
        # In the order of the model; what does not belong to it stays, for the table to refuse.
        leaves={name: found[name] for name in sorted(found, key=_position(expected))},
        tokenizer=Tokenizer.load(tokenizer_file) if tokenizer_file else None,
        step=origin["step"],
        metrics=meta.get("metrics", {}),
    )


def _check_layers(spec: ModelSpec, num_tensors: int, place: Path) -> None:
    """Checks that a number of layers can be meant, before names of all of them are made."""
    if spec.num_layers > num_tensors:
        raise ShapeMismatchError(
            f"{place}: the config says {spec.num_layers} layers, and there are {num_tensors} "
            "tensors; one of them belongs to another model"
        )


def _position(expected: Mapping[str, Any]) -> Any:
    order = {name: i for i, name in enumerate(expected)}
    return lambda name: order.get(name, len(order))


# Everything else.


def _open_foreign(place: Path, options: Options) -> Source:
    if place.is_dir():
        config = _folder_config(place, options)
        target = _target_of_config(config, place, options)
        weights = open_weights(place, options.allow_globals)
        raw: Tensors = weights.tensors
        tokenizer, manifest = hf_files.read_tokenizer(place), _manifest(place)
        origin = (manifest or {}).get("source", {})
        run, step, metrics = origin.get("run"), origin.get("step", 0), {}
    else:
        weights = open_weights(place, options.allow_globals)
        raw, described = _state_dict(weights, place)
        target, config = _of_file(raw, described, place, options)
        tokenizer, manifest, run = None, None, None
        step, metrics = _progress(weights.container)
    names = cleaned(raw, _anchors(target), options.strip_prefix, options.ignore_keys)
    notes = list(weights.notes)
    if names.found:
        notes.append(f"names: took away {', '.join(names.found)}")
    if config is None:
        shapes = {name: tensor.shape for name, tensor in names.tensors.items()}
        config = _guessed(target, shapes, options.num_heads, place)
        notes.append(f"no config: {json.dumps(config)}, the rest as {target.name} has it")
    try:
        reading = target.read_config(config)
    except InteropError as error:
        raise type(error)(f"{place}: {error}", **error.details) from None
    except (TypeError, ValueError, AttributeError) as error:
        raise CorruptFileError(f"{place}: its config cannot be understood: {error}") from error
    _check_layers(reading.spec, len(names.tensors), place)
    _check_allowed(reading.approximations, options.allow_approx, place)
    spec, tensors = _without_zero_biases(
        reading.spec, target, names.tensors, manifest, options.drop_zero_bias, notes
    )
    rules = target.mapping(spec)
    expected = leaves(spec)
    try:
        found = rules.inverse(tensors, expected)
    except InteropError as error:
        raise type(error)(f"{place}: {error}", **error.details) from None
    return Source(
        path=place,
        run=run,
        kind=target.name,
        spec=spec,
        leaves={name: found[name] for name in expected},
        tokenizer=tokenizer,
        step=step,
        metrics=metrics,
        rules=rules,
        tensors=tensors,
        manifest=manifest,
        approximations=reading.approximations,
        notes=tuple(notes),
    )


def _folder_config(folder: Path, options: Options) -> dict[str, Any] | None:
    file = options.config or folder / hf_files.CONFIG
    if file.is_file():
        return hf_files.read_json(file)
    if options.config:
        raise UsageError(f"--config {file}: no such file")
    there = listed(sorted(p.name for p in folder.iterdir())) or "nothing"
    if (folder / "adapter_config.json").is_file():
        raise UnknownArchitectureError(
            f"{folder} holds an adapter, not a model; merge it into its base model first"
        )
    raise CorruptFileError(
        f"{folder} is no run of craft_jax and has no {hf_files.CONFIG}; it holds {there}"
    )


def _target_of_config(config: Mapping[str, Any], place: Path, options: Options) -> Target:
    kind = config.get("model_type")
    if options.kind in TARGETS:
        return TARGETS[options.kind]
    for target in TARGETS.values():
        if kind is not None and target.model_type == kind:
            return target
    known = ", ".join(t.model_type for t in TARGETS.values() if t.model_type)
    architectures = ", ".join(config.get("architectures") or ["unnamed"])
    raise UnknownArchitectureError(
        f"{place} is a {kind!r} model ({architectures}); interop reads {known}"
    )


def _state_dict(weights: Weights, place: Path) -> tuple[Tensors, Mapping[str, Any] | None]:
    """Finds the tensors in a file, and the dict around them if there is one."""
    if weights.tensors:
        return weights.tensors, None
    value = weights.container
    if isinstance(value, Stub):
        raise CorruptFileError(
            f"{place} holds an object of {value.name}, not weights; save its state_dict() instead"
        )
    if not isinstance(value, Mapping):
        what = "no tensors" if value is None else f"{type(value).__name__}, not weights"
        raise CorruptFileError(f"{place} holds {what}")
    found = [name for name in _STATE_DICTS if _is_state_dict(value.get(name))]
    if len(found) > 1:
        raise AmbiguousSourceError(
            f"{place} holds several sets of weights: {', '.join(found)}; save one of them alone"
        )
    if not found:
        ema = [name for name in _EMA if _is_state_dict(value.get(name))]
        also = f" (averaged weights alone: {', '.join(ema)})" if ema else ""
        raise CorruptFileError(
            f"{place} holds no weights under {', '.join(_STATE_DICTS)}{also}; it has "
            + listed(map(str, value))
        )
    return value[found[0]], value


def _is_state_dict(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(v, LazyTensor) for v in value.values())
    )


def _of_file(
    raw: Tensors, around: Mapping[str, Any] | None, place: Path, options: Options
) -> tuple[Target, Mapping[str, Any] | None]:
    """Finds the target that a file is in the form of, and its config if it has one."""
    config = hf_files.read_json(options.config) if options.config else None
    if options.kind in TARGETS:
        target = TARGETS[options.kind]
    elif config and config.get("model_type"):
        target = _target_of_config(config, place, options)
    else:
        target = _recognised(raw, place, options)
    if config is None and around is not None:
        described = around.get("model_args")
        config = described if isinstance(described, Mapping) else None
    return target, config


def _recognised(raw: Tensors, place: Path, options: Options) -> Target:
    for target in TARGETS.values():
        names = cleaned(raw, _anchors(target), options.strip_prefix, options.ignore_keys)
        if target.recognises({name: tensor.shape for name, tensor in names.tensors.items()}):
            return target
    raise UnknownArchitectureError(
        f"{place}: no architecture that interop knows has tensors like {listed(raw)}; it reads "
        + ", ".join(TARGETS)
    )


def _anchors(target: Target) -> list[tuple[str, str]]:
    """The names by which a target is found: with, and without, what some files leave out."""
    prefix = target.optional_prefix
    short = [(target.anchor.removeprefix(prefix), prefix)] if prefix else []
    return [(target.anchor, ""), *short]


def _guessed(
    target: Target, shapes: Mapping[str, tuple[int, ...]], num_heads: int | None, place: Path
) -> dict[str, Any]:
    try:
        return target.guess_config(shapes, num_heads)
    except (KeyError, ValueError) as error:
        raise CorruptFileError(
            f"{place}: without a config, the sizes of {target.name} are read from its tensors, and "
            f"{error} is missing or has another shape"
        ) from None


def _progress(container: Any) -> tuple[int, dict[str, Any]]:
    """Returns the step and the validation loss of a training checkpoint."""
    if not isinstance(container, Mapping):
        return 0, {}
    step, loss = container.get("iter_num", 0), container.get("best_val_loss")
    metrics = {"val_loss": loss} if isinstance(loss, float) else {}
    return (step if isinstance(step, int) else 0), metrics


def _manifest(folder: Path) -> dict[str, Any] | None:
    file = folder / MANIFEST
    if not file.is_file():
        return None
    value = hf_files.read_json(file)
    kinds = {"source": dict, "synthetic": list, "canonical": dict, "dtype": str}
    is_sound = all(isinstance(value.get(name), kind) for name, kind in kinds.items())
    if not is_sound or not isinstance(value["source"].get("step"), int):
        raise CorruptFileError(f"{file} is no manifest of an export; remove it")
    return value


def _check_allowed(crossed: Mapping[str, str], allow_approx: Any, place: Path) -> None:
    allowed = Allowed.of(allow_approx)
    refused = {name: why for name, why in crossed.items() if not allowed.covers(name)}
    if refused:
        raise NotRepresentableError(
            f"{place} cannot be read exactly: {'; '.join(refused.values())}; --allow-approx="
            f"{','.join(refused)} accepts that",
            reasons=list(refused.values()),
        )


def _without_zero_biases(
    spec: ModelSpec,
    target: Target,
    tensors: Tensors,
    manifest: Mapping[str, Any] | None,
    drop: bool,
    notes: list[str],
) -> tuple[ModelSpec, Tensors]:
    """Reads biases that an export made up, or that the user says mean nothing, as no biases."""
    recorded = tuple((manifest or {}).get("synthetic", ()))
    if not spec.bias or not (recorded or drop):
        return spec, tensors
    bare = dataclasses.replace(spec, bias=False)
    made_up = target.mapping(bare).synthetic
    if not made_up or (not drop and set(made_up) != set(recorded)):
        return spec, tensors
    used = [name for name in made_up if name in tensors and np.any(tensors[name].read())]
    if used:
        if drop:
            raise ShapeMismatchError(
                f"--drop-zero-bias: {len(used)} biases are not zero: {listed(used)}; leave it out"
            )
        notes.append(f"biases: {len(used)} of those that were made up as zeros are zero no more")
        return spec, tensors
    notes.append(f"biases: all {len(made_up)} are zeros, read as no biases")
    return bare, tensors


def with_dtype(source: Source, dtype: np.dtype | None) -> Source:
    """Returns a source whose leaves have another dtype; None keeps each as it is.

    Raises:
      DtypeError: a leaf has one that no model here can have.
    """
    cast.check_dtypes(source.leaves, dtype)
    return dataclasses.replace(source, leaves=cast.as_dtype(source.leaves, dtype))


def trimmed(source: Source) -> tuple[Source, dict[str, Any]]:
    """Returns a source without the embedding rows that no token of its tokenizer reads.

    Returns:
      The source, and what was left out: `rows`, and the digest of each leaf's part.

    Raises:
      UsageError: there is no tokenizer, or nothing to leave out.
    """
    if source.tokenizer is None:
        raise UsageError("--trim-vocab: without a tokenizer, no row is known to be unused")
    rows, keep = source.spec.vocab_size, source.tokenizer.vocab_size
    if keep >= rows:
        raise UsageError(f"--trim-vocab: all {rows} rows stand for tokens; leave it out")
    spec = dataclasses.replace(source.spec, vocab_size=keep)
    now = leaves(spec)
    names = tuple(n for n, leaf in source.leaves.items() if n in now and now[n].shape != leaf.shape)
    lost = {name: cast.digest(source.leaves[name].read()[keep:]) for name in names}
    found = cast.trimmed(source.leaves, names, keep)
    return dataclasses.replace(source, spec=spec, leaves=found), {
        "rows": rows - keep,
        "sha256": lost,
    }


def tokenizer_of(source: Source, given: str | Path | None) -> Tokenizer | None:
    """Returns the tokenizer to use: the one that is given, or the source's own; `none` for none.

    Raises:
      UsageError, CorruptFileError: the given one cannot be opened.
      ShapeMismatchError: it has more tokens than the model.
    """
    tokenizer = source.tokenizer
    if given is not None:
        try:
            folder = Path(given)
            tokenizer = None if str(given) == "none" else _open_tokenizer(folder)
        except CraftError as error:
            raise CorruptFileError(f"--tokenizer {given}: {error}") from None
    if tokenizer and tokenizer.vocab_size > source.spec.vocab_size:
        raise ShapeMismatchError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, and the embedding of {source.path} "
            f"has {source.spec.vocab_size} rows; it is another model's; --tokenizer none leaves it "
            "out"
        )
    return tokenizer


def _open_tokenizer(place: Path) -> Tokenizer | None:
    run = _run_folder(place)
    if run is not None:
        store = Checkpoints(outputs.open_run(run[0]).checkpoints)
        step = store.latest() if run[1] is None else run[1]
        file = store.tokenizer_file(step) if step is not None else None
        if file is None:
            raise CorruptFileError("the run has no tokenizer")
        return Tokenizer.load(file)
    if place.is_dir():
        found = hf_files.read_tokenizer(place)
        if found is None:
            raise CorruptFileError("the folder has no tokenizer.json")
        return found
    return Tokenizer.load(place)
