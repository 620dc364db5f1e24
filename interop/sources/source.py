"""Opens a model wherever it lives: a run of craft_jax, or a file or folder of any target.

What comes out is a `Source`: what the model is, and its leaves by the names of craft_jax, to be
read one by one. Only headers and configs are read here.
"""

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from craft_jax import outputs
from craft_jax.checkpoint import manifest as manifests
from craft_jax.data.base import sizes_from
from craft_jax.data.images.format import ImageFormat
from craft_jax.data.tokenizers import Tokenizer
from craft_jax.errors import CraftError, UsageError
from craft_jax.outputs import Checkpoints
from interop.craft import lineages, tokenizers
from interop.errors import (
    AmbiguousSourceError,
    CollidingKeysError,
    CorruptFileError,
    InteropError,
    NotRepresentableError,
    ShapeMismatchError,
    UncommittedCheckpointError,
    UnknownArchitectureError,
    listed,
    nearest,
)
from interop.files import hugging_face, orbax
from interop.files.pickles import Stub
from interop.files.plain import plain
from interop.files.torchfile import read_record
from interop.files.weights import Weights, open_weights
from interop.mapping import dtypes, folds
from interop.mapping.keys import cleaned
from interop.mapping.shapes import leaves
from interop.mapping.spec import Spec, read_spec
from interop.mapping.table import Mapping as Rules
from interop.mapping.tensors import LazyTensor, Tensors
from interop.targets import torch_stacks
from interop.targets.base import Allowed, Reading
from interop.targets.registry import GROUPS, TARGETS, Target

CRAFT = "craft_jax"
MANIFEST = "interop_manifest.json"
WEIGHTS = ("average", "last")
# Where training frameworks keep the weights inside a pickled checkpoint.
_STATE_DICTS = ("model", "state_dict", "model_state_dict", "module", "net")
_EMA = ("ema", "model_ema", "ema_state_dict", "ema_model")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What a person may say about a source.

    Attributes:
      kind: `auto`, or the name of a target; `hf` for a Hugging Face folder, `craft` for a file or
        folder of Craft.
      num_heads: for tensors without a config.
      config: a config for tensors without one: a file, or JSON that begins with `{`.
      strip_prefix, ignore_keys: see `names.cleaned`.
      allow_approx: approximations, see `Allowed`.
      allow_globals: names that a pickle may mention; they become inert stubs.
      drop_zero_bias: read biases that are all zero as no biases.
      weights: of a run whose optimizer kept an average of them: `average`, or the `last` ones.
      recorded: the part of a manifest that an export has not written yet when it reads back.
    """

    kind: str = "auto"
    num_heads: int | None = None
    config: str | Path | None = None
    strip_prefix: str | None = None
    ignore_keys: tuple[str, ...] = ()
    allow_approx: Any = None
    allow_globals: tuple[str, ...] = ()
    drop_zero_bias: bool = False
    weights: str = "average"
    recorded: Mapping[str, Any] | None = None

    def __post_init__(self):
        if self.kind not in GROUPS and self.kind not in TARGETS:
            kinds = ", ".join((*GROUPS, *TARGETS))
            raise UsageError(f"--from {self.kind} is not one of {kinds}")
        if self.weights not in WEIGHTS:
            raise UsageError(f"--weights {self.weights} is not one of {', '.join(WEIGHTS)}")
        Allowed.of(self.allow_approx)

    @property
    def targets(self) -> tuple[Target, ...]:
        """The targets that the source may be in the form of."""
        return tuple(TARGETS[name] for name in GROUPS.get(self.kind, (self.kind,)))

    def given_config(self) -> dict[str, Any] | None:
        """Returns the config that was given, or None.

        Raises:
          UsageError: there is no such file.
          CorruptFileError: it is no JSON object.
        """
        if self.config is None:
            return None
        if str(self.config).lstrip().startswith("{"):
            try:
                return dict(json.loads(str(self.config)))
            except ValueError as error:
                raise UsageError(f"--config {self.config}: no JSON: {error}") from None
        if not Path(self.config).is_file():
            raise UsageError(f"--config {self.config}: no such file")
        return hugging_face.read_json(Path(self.config))

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
            if field.name not in ("allow_approx", "weights")
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
      images: what the images are that it was trained on; None for text, or where nothing says.
      step: updates made, where that is known.
      metrics: of the last evaluation, where they are known.
      rules: between leaves and `tensors`; None for a run.
      tensors: by the target's names; None for a run.
      original: the names of these in the file, where wrappers have changed them.
      manifest: what the export that wrote it recorded, if one did.
      approximations: what had to be crossed to read it, reason by name.
      notes: what else is worth knowing, one line each.
    """

    path: Path
    run: str | None = None
    kind: str
    spec: Spec
    leaves: dict[str, LazyTensor]
    tokenizer: Tokenizer | None
    images: ImageFormat | None = None
    step: int = 0
    metrics: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    rules: Rules | None = None
    tensors: Tensors | None = None
    original: Mapping[str, str] = dataclasses.field(default_factory=dict)
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
    place, options = Path(path).expanduser(), options or Options()
    if not place.exists():
        run = Path("outputs/models") / path
        hint = f"; did you mean {run}?" if run.exists() else ""
        raise CorruptFileError(f"{path}: no such file or folder{hint}")
    found = _run_folder(place)
    if found is not None:
        return _open_run(*found, last=options.weights == "last")
    if _looks_like_checkpoint(place):
        raise UncommittedCheckpointError(
            f"{place} is no finished checkpoint of a run; name the run's folder, or one of "
            "checkpoints/STEP in it"
        )
    return _open_foreign(place, options)


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


def _open_run(folder: Path, step: int | None, *, last: bool) -> Source:
    store = Checkpoints(outputs.open_run(folder).checkpoints)
    steps = store.steps()
    bad = store.damaged()
    if step is None:
        step, newer = store.newest_good("fast")
        bad |= newer
    elif step in steps and (wrong := store.wrong(step, "fast")):
        bad[step] = wrong
    if bad and (step is None or max(bad) >= step):
        worst = max(bad)
        others = [str(other) for other in steps if other not in bad]
        have = f"name another: {store.folder}/{others[-1]}" if others else "there is no other"
        raise CorruptFileError(
            f"checkpoint {store.folder / str(worst)} is damaged: {bad[worst]}; {have}"
        )
    if step is None or step not in steps:
        which = f"step {step}" if step is not None else "any step"
        have = f"; it has {', '.join(map(str, steps))}" if steps else ""
        raise UncommittedCheckpointError(
            f"run {folder} has no finished checkpoint of {which}{have}"
        )
    meta, config = store.meta(step), store.config(step)
    try:
        images = _images(meta)
        spec = read_spec(config["model"], sizes_from(meta["vocab_size"], images))
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise CorruptFileError(
            f"checkpoint {step} of {folder}: its config cannot be understood: {error!r}"
        ) from error
    tokenizer_file = store.tokenizer_file(step)
    manifest = manifests.read(store.folder / str(step))
    crcs = {name: leaf.crc32 for name, leaf in manifest.leaves.items()}
    part = store.params_part(step, last=last)
    found = {
        name: _checked(leaf, store.folder / str(step), name, crcs[f"{part}/{name}"])
        for name, leaf in orbax.read_params(store.folder / str(step) / part).items()
    }
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
        images=images,
        step=origin["step"],
        metrics=meta.get("metrics", {}),
    )


def _checked(leaf: LazyTensor, checkpoint: Path, name: str, crc: int) -> LazyTensor:
    """Compares an array, when it is read, with the checksum taken before it was written."""

    def read() -> np.ndarray:
        array = leaf.read()
        if manifests.array_crc(array) != crc:
            raise CorruptFileError(
                f"checkpoint {checkpoint} is damaged: {name}: crc32 mismatch; name another"
            )
        return array

    return LazyTensor(leaf.shape, leaf.dtype, read)


def _check_layers(spec: Spec, num_tensors: int, place: Path) -> None:
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
        config: Mapping[str, Any] | None = _folder_config(place, options)
        declared = _declared(config, place, options)
        weights = open_weights(place, options.allow_globals)
        raw: Tensors = weights.tensors
        target = declared or _recognised(raw, place, dataclasses.replace(options, kind="craft"))
        manifest, around = _manifest_in(place), {}
        step, metrics = (manifest or {}).get("source", {}).get("step", 0), {}
    else:
        weights = open_weights(place, options.allow_globals)
        raw, found = _state_dict(weights, place)
        around = plain(found or {})
        manifest = _manifest_of(place)
        target, config = _of_file(raw, around, manifest, place, options)
        step, metrics = _progress(around)
    names = cleaned(raw, _anchors(target), options.strip_prefix, options.ignore_keys)
    notes = list(weights.notes)
    if names.found:
        notes.append(f"names: took away {', '.join(names.found)}")
    complete, reading = _understood(target, config, names.tensors, options, place)
    _check_heads(reading.spec, options, place)
    notes += reading.notes
    if config is None:
        notes.append(f"no config: {json.dumps(complete)}, the rest as {target.name} has it")
    _check_layers(reading.spec, len(names.tensors), place)
    _check_allowed(reading.approximations, options.allow_approx, place)
    spec = _as_recorded(reading.spec, manifest)
    spec, tensors = _without_made_up(spec, target, names.tensors, manifest, options, notes)
    rules = target.mapping(spec)
    expected = leaves(spec)
    try:
        inverse = rules.inverse(tensors, expected)
    except InteropError as error:
        raise type(error)(f"{place}: {error}", **error.details) from None
    if checked := [buffer.name for buffer in rules.buffers if buffer.name in tensors]:
        notes.append(f"buffers: {listed(checked)}, with the values that they must have")
    approximations = dict(reading.approximations)
    if _wants_fold(spec, options):
        folded = folds.without_cross_attention(spec)
        inverse = folds.towards(spec, inverse, folded)
        approximations[folds.CROSS] = "the constant of the cross-attention is now in a bias"
        spec, rules, expected = folded, None, leaves(folded)
    return Source(
        path=place,
        run=(manifest or {}).get("source", {}).get("run"),
        kind=target.name,
        spec=spec,
        leaves={name: inverse[name] for name in expected},
        tokenizer=_tokenizer_in(place, around, target, notes),
        images=_images_in(place, config, manifest),
        step=step,
        metrics=metrics,
        rules=rules,
        tensors=tensors,
        original=names.original,
        manifest=manifest,
        approximations=approximations,
        notes=tuple(notes),
    )


def _understood(
    target: Target,
    config: Mapping[str, Any] | None,
    tensors: Tensors,
    options: Options,
    place: Path,
) -> tuple[Mapping[str, Any], Reading]:
    """Returns the config, completed by what tensors and person say, and what it means."""
    try:
        _check_given(target, options)
        complete = target.complete_config(config, tensors, options.num_heads)
        reading = target.read_config(complete)
    except (InteropError, UsageError) as error:
        details = getattr(error, "details", {})
        raise type(error)(f"{place}: {error}", **details) from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = (
            f"without a config, the sizes of {target.name} are read from its tensors, and {error} "
            "is missing or has another shape"
            if config is None or isinstance(error, KeyError)
            else f"its config cannot be understood: {error}"
        )
        raise CorruptFileError(f"{place}: {what}") from error
    return complete, reading


def _wants_fold(spec: Spec, options: Options) -> bool:
    """Whether the cross-attention is to be folded; allowing everything does not ask for that."""
    asked = folds.CROSS in Allowed.of(options.allow_approx).names
    return asked and spec.cross_attention in folds.CONSTANT


def _check_heads(spec: Spec, options: Options, place: Path) -> None:
    if options.num_heads not in (None, spec.num_heads):
        raise UsageError(
            f"{place}: --n-head={options.num_heads}, but its config says {spec.num_heads}; leave "
            "it out, or give the config that is right with --config"
        )


def _check_given(target: Target, options: Options) -> None:
    """Checks that a config which a person gave says nothing in vain.

    Raises:
      UsageError: it has a name that means nothing to the target.
    """
    given = options.given_config() or {}
    if unknown := target.unknown_settings(given):
        known = [
            n
            for n in (*torch_stacks.FIELDS, *lineages.SETTINGS)
            if not target.unknown_settings({n: None})
        ]
        raise UsageError(
            f"--config: {unknown[0]!r} is no setting of {target.name}{nearest(unknown[0], known)}; "
            f"there are {', '.join(known)}"
        )


def _folder_config(folder: Path, options: Options) -> dict[str, Any]:
    given = options.given_config()
    if given is not None:
        return given
    file = folder / hugging_face.CONFIG
    if file.is_file():
        return hugging_face.read_json(file)
    there = listed(sorted(p.name for p in folder.iterdir())) or "nothing"
    if (folder / "adapter_config.json").is_file():
        raise UnknownArchitectureError(
            f"{folder} holds an adapter, not a model; merge it into its base model first"
        )
    raise CorruptFileError(
        f"{folder} is no run of craft_jax and has no {hugging_face.CONFIG}; it holds {there}"
    )


def _declared(config: Mapping[str, Any], place: Path, options: Options) -> Target | None:
    """Returns the target that a config names; None for one of Craft's, which name no library."""
    kind = config.get("model_type")
    if options.kind in TARGETS:
        return TARGETS[options.kind]
    for target in options.targets:
        if kind is not None and target.model_type == kind:
            return target
    if options.kind == "craft" or {"d_model", "n_head"} <= set(lineages.settings_in(config) or ()):
        return None
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
    raw: Tensors,
    around: Mapping[str, Any],
    manifest: Mapping[str, Any] | None,
    place: Path,
    options: Options,
) -> tuple[Target, Mapping[str, Any] | None]:
    """Finds the target that a file is in the form of, and its config if it has one."""
    config = options.given_config()
    written_by = (manifest or {}).get("target")
    if options.kind in TARGETS:
        target = TARGETS[options.kind]
    elif written_by in TARGETS and TARGETS[written_by] in options.targets:
        target = TARGETS[written_by]
    else:
        declared = _declared(config, place, options) if config and "model_type" in config else None
        target = declared or _recognised(raw, place, options)
    if config is None:
        config = target.config_in(around)
    if config is None and manifest is not None and written_by == target.name:
        config = manifest.get("spec") if target.container == "torch" else None
    return target, config


def _recognised(raw: Tensors, place: Path, options: Options) -> Target:
    problem: InteropError | None = None
    for target in options.targets:
        try:
            names = cleaned(raw, _anchors(target), options.strip_prefix, options.ignore_keys)
            if target.recognises({name: tensor.shape for name, tensor in names.tensors.items()}):
                return target
        except (AmbiguousSourceError, CollidingKeysError) as error:
            # The anchor of one target may stand inside of another's names.
            problem = problem or type(error)(f"{place}: {error}", **error.details)
    if problem is not None:
        raise problem
    raise UnknownArchitectureError(
        f"{place}: no architecture that interop knows has tensors like {listed(raw)}; it reads "
        + ", ".join(target.name for target in options.targets)
        + "; if it is one of these, --from NAME says what is lacking"
    )


def _anchors(target: Target) -> list[tuple[str, str]]:
    """The names by which a target is found: with, and without, what some files leave out."""
    prefix = target.optional_prefix
    short = [(target.anchor.removeprefix(prefix), prefix)] if prefix else []
    return [(target.anchor, ""), *short, *((anchor, "") for anchor in target.other_anchors)]


def _progress(around: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
    """Returns the step and the validation loss of a training checkpoint."""
    step = around.get("iter_num", around.get("global_step", 0))
    loss = around.get("best_val_loss", around.get("best_val_metric"))
    metrics = {"val_loss": loss} if isinstance(loss, float) else {}
    return (step if isinstance(step, int) else 0), metrics


def _tokenizer_in(
    place: Path, around: Mapping[str, Any], target: Target, notes: list[str]
) -> Tokenizer | None:
    """Returns the tokenizer that a file holds or a folder has, or None."""
    folder = place if place.is_dir() else place.parent
    found = hugging_face.read_tokenizer(place) if place.is_dir() else None
    if found is not None or target.container != "craft":
        return found
    found = tokenizers.of_container(around) or tokenizers.read_folder(folder)
    if found is None and (note := tokenizers.sentencepiece_note(folder)):
        notes.append(note)
    return found


def _images(described: Mapping[str, Any]) -> ImageFormat | None:
    found = described.get("images")
    return None if found is None else ImageFormat.from_json(found)


def _images_in(
    place: Path, config: Mapping[str, Any] | None, manifest: Mapping[str, Any] | None
) -> ImageFormat | None:
    """Returns what config or manifest say of images, None if neither does.

    Raises:
      CorruptFileError: it cannot be understood.
    """
    try:
        return _images(config or {}) or _images(manifest or {})
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise CorruptFileError(f"{place}: its `images` cannot be understood: {error!r}") from error


def _manifest_in(folder: Path) -> dict[str, Any] | None:
    file = folder / MANIFEST
    return _checked_manifest(hugging_face.read_json(file), file) if file.is_file() else None


def _manifest_of(file: Path) -> dict[str, Any] | None:
    """Returns the manifest that an export put into a file of PyTorch, or None."""
    record = read_record(file, MANIFEST)
    if record is None:
        return None
    try:
        value = json.loads(record)
    except ValueError as error:
        raise CorruptFileError(f"{file}: its {MANIFEST} is no JSON: {error}") from error
    return _checked_manifest(value if isinstance(value, dict) else {}, file)


def _checked_manifest(value: dict[str, Any], file: Path) -> dict[str, Any]:
    kinds = {"source": dict, "synthetic": list, "canonical": dict, "dtype": str, "spec": dict}
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


_MADE_UP = ("bias", "norm_bias", "final_norm_bias", "cross_attention")
"""Attributes by which a model may have less than a target demands."""


def _as_recorded(spec: Spec, manifest: Mapping[str, Any] | None) -> Spec:
    """Returns a spec in the family that an export wrote down, if it is the same model in that."""
    name = (manifest or {}).get("spec", {}).get("name")
    try:
        return dataclasses.replace(spec, name=name) if isinstance(name, str) else spec
    except UnknownArchitectureError:
        return spec


def _without_made_up(
    spec: Spec,
    target: Target,
    tensors: Tensors,
    manifest: Mapping[str, Any] | None,
    options: Options,
    notes: list[str],
) -> tuple[Spec, Tensors]:
    """Reads zeros that an export made up, or that the user says mean nothing, as nothing."""
    record = options.recorded or manifest or {}
    recorded, drop = tuple(record.get("synthetic", ())), options.drop_zero_bias
    if not spec.is_of_tokens or target.mapping(spec).synthetic:
        return spec, tensors  # The config says it already, and the table checks them.
    for bare in _barer(spec, record if recorded else {}, drop):
        made_up = target.mapping(bare).synthetic
        if not made_up or (not drop and set(made_up) != set(recorded)):
            continue
        used = [name for name in made_up if name in tensors and np.any(tensors[name].read())]
        if not used:
            notes.append(f"biases: all {len(made_up)} are zeros, read as no biases")
            return bare, tensors
        if not drop:
            notes.append(
                f"biases: {len(used)} of those that were made up as zeros are zero no more"
            )
            return spec, tensors
    if drop and spec.bias:
        made_up = target.mapping(dataclasses.replace(spec, **_NO_BIAS)).synthetic
        used = [name for name in made_up if name in tensors and np.any(tensors[name].read())]
        if used:
            raise ShapeMismatchError(
                f"--drop-zero-bias: {len(used)} biases are not zero: {listed(used)}; leave it out"
            )
    return spec, tensors


_NO_BIAS = {"bias": False, "norm_bias": False, "final_norm_bias": False}


def _barer(spec: Spec, record: Mapping[str, Any], drop: bool) -> Iterator[Spec]:
    """Yields specs with less: what a manifest says, or else without biases."""
    candidates: list[dict[str, Any]] = []
    if recorded := record.get("spec"):
        # Manifests from before layer norms had a setting of their own say bias alone.
        candidates.append({name: recorded.get(name) for name in _MADE_UP if name in recorded})
        candidates[0].setdefault("norm_bias", None)
        candidates[0].setdefault("final_norm_bias", None)
    if drop and spec.bias:
        candidates += [_NO_BIAS, {"norm_bias": False, "final_norm_bias": False}]
    for changes in candidates:
        with contextlib.suppress(UnknownArchitectureError):
            yield dataclasses.replace(spec, **changes)


def with_dtype(source: Source, dtype: np.dtype | None) -> Source:
    """Returns a source whose leaves have another dtype; None keeps each as it is.

    Raises:
      DtypeError: a leaf has one that no model here can have.
    """
    dtypes.check_dtypes(source.leaves, dtype)
    return dataclasses.replace(source, leaves=dtypes.as_dtype(source.leaves, dtype))


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
    lost = {name: dtypes.digest(source.leaves[name].read()[keep:]) for name in names}
    found = dtypes.trimmed(source.leaves, names, keep)
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
        found = hugging_face.read_tokenizer(place) or tokenizers.read_folder(place)
        if found is None:
            raise CorruptFileError("the folder has no tokenizer.json")
        return found
    if place.name == tokenizers.VOCAB or place.suffix == ".pkl":
        found = tokenizers.read_file(place)
        if found is None:
            raise CorruptFileError("there is no vocabulary in it")
        return found
    return Tokenizer.load(place)
