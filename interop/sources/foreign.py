"""Opens a folder or a file of any target."""

import dataclasses
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from craft_jax.data.images.format import ImageFormat
from craft_jax.data.tokenizers import Tokenizer
from craft_jax.errors import UsageError
from interop.craft import lineages, tokenizers
from interop.errors import (
    AmbiguousSourceError,
    CollidingKeysError,
    CorruptFileError,
    InteropError,
    NotRepresentableError,
    UnknownArchitectureError,
    listed,
    nearest,
)
from interop.files import hugging_face
from interop.files.pickles import Stub
from interop.files.plain import plain
from interop.files.weights import Weights, open_weights
from interop.mapping import folds
from interop.mapping.keys import cleaned, is_ignored
from interop.mapping.shapes import leaves
from interop.mapping.spec import Spec
from interop.mapping.tensors import LazyTensor, Tensors
from interop.sources.manifest import as_recorded, manifest_in, manifest_of, without_synthetic
from interop.sources.source import Options, Source, check_layers, images_of
from interop.targets import nanogpt, torch_stacks
from interop.targets.base import Allowed, Reading
from interop.targets.registry import TARGETS, Target

# Where training frameworks keep the weights inside a pickled checkpoint.
_STATE_DICTS = ("model", "state_dict", "model_state_dict", "module", "net")

_EMA = ("ema", "model_ema", "ema_state_dict", "ema_model")


class _Contents(NamedTuple):
    """The parts of a folder or a file.

    Attributes:
      target: the form that it is in.
      config: None where it has none.
      tensors: by the names in the file.
      around: the plain values beside the tensors of a file.
      manifest: of the export that wrote it, or None.
      step: number of updates.
      metrics: of the last evaluation.
      notes: on the choice of files.
    """

    target: Target
    config: Mapping[str, Any] | None
    tensors: Tensors
    around: Mapping[str, Any]
    manifest: Mapping[str, Any] | None
    step: int
    metrics: Mapping[str, Any]
    notes: tuple[str, ...]


def open_foreign(place: Path, options: Options) -> Source:
    """Opens a folder or a file that is not a run of craft_jax.

    Raises:
      InteropError: it cannot be read; see docs/interop.md for the cases.
    """
    contents = (_folder_contents if place.is_dir() else _file_contents)(place, options)
    target, config, manifest = contents.target, contents.config, contents.manifest
    names = cleaned(contents.tensors, _anchors(target), options.strip_prefix, options.ignore_keys)
    notes = list(contents.notes)
    if names.found:
        notes.append(f"names: took away {', '.join(names.found)}")
    complete, reading = _understood(target, config, names.tensors, options, place)
    _check_heads(reading.spec, options, place)
    notes += reading.notes
    if config and config.get("tie_word_embeddings", True) != complete.get(
        "tie_word_embeddings", True
    ):
        notes.append(f"config: {' and '.join(target.tied)} differ, so both are kept, not tied")
    if config is None:
        notes.append(f"no config: {json.dumps(complete)}, the rest as {target.name} has it")
    check_layers(reading.spec, len(names.tensors), place)
    _check_allowed(reading.approximations, options.allow_approx, place)
    spec = as_recorded(reading.spec, manifest)
    spec, tensors = without_synthetic(spec, target, names.tensors, manifest, options, notes)
    rules, expected = target.mapping(spec), leaves(spec)
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
        tokenizer=_tokenizer_in(place, contents.around, target, notes),
        images=_images_in(place, config, manifest),
        step=contents.step,
        metrics=contents.metrics,
        rules=rules,
        tensors=tensors,
        original=names.original,
        manifest=manifest,
        approximations=approximations,
        notes=tuple(notes),
    )


def _folder_contents(folder: Path, options: Options) -> _Contents:
    config = _folder_config(folder, options)
    declared = _declared(config, folder, options)
    weights = open_weights(folder, options.allow_globals)
    craft = dataclasses.replace(options, kind="craft")
    manifest = manifest_in(folder)
    return _Contents(
        target=declared or _recognised_target(weights.tensors, folder, craft),
        config=config,
        tensors=weights.tensors,
        around={},
        manifest=manifest,
        step=(manifest or {}).get("source", {}).get("step", 0),
        metrics={},
        notes=weights.notes,
    )


def _file_contents(file: Path, options: Options) -> _Contents:
    weights = open_weights(file, options.allow_globals)
    tensors, found = _state_dict(weights, file, options.ignore_keys)
    around = plain(found or {})
    manifest = manifest_of(file)
    target, config = _of_file(tensors, around, manifest, file, options)
    step, metrics = _progress(around)
    return _Contents(target, config, tensors, around, manifest, step, metrics, weights.notes)


def _understood(
    target: Target,
    config: Mapping[str, Any] | None,
    tensors: Tensors,
    options: Options,
    place: Path,
) -> tuple[Mapping[str, Any], Reading]:
    """Returns the config, completed from the tensors and the options, and its meaning."""
    try:
        _check_given(target, options)
        complete = target.complete_config(config, tensors, options.num_heads)
        reading = target.read_config(complete)
    except (InteropError, UsageError) as error:
        details = error.details if isinstance(error, InteropError) else {}
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
    """Returns whether to fold the cross-attention; `allow_approx=all` does not."""
    asked = folds.CROSS in Allowed.of(options.allow_approx).names
    return asked and spec.cross_attention in folds.CONSTANT


def _check_heads(spec: Spec, options: Options, place: Path) -> None:
    if options.num_heads not in (None, spec.num_heads):
        raise UsageError(
            f"{place}: `num_heads={options.num_heads}`, but its config says {spec.num_heads}; "
            "leave it out, or give the right `config`"
        )


def _check_given(target: Target, options: Options) -> None:
    """Checks that the target knows all settings of a given config.

    Raises:
      UsageError: it does not know one.
    """
    given = options.given_config() or {}
    if unknown := target.unknown_settings(given):
        names = dict.fromkeys((*torch_stacks.FIELDS, *lineages.SETTINGS, *nanogpt.SETTINGS))
        known = [name for name in names if not target.unknown_settings({name: None})]
        raise UsageError(
            f"`config`: {unknown[0]!r} is no setting of {target.name}{nearest(unknown[0], known)}; "
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
    """Returns the target that a config names; None for Craft, whose configs name no library."""
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


def _state_dict(
    weights: Weights, place: Path, ignore: Collection[str]
) -> tuple[Tensors, Mapping[str, Any] | None]:
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
    if not found and 2 * sum(isinstance(v, LazyTensor) for v in value.values()) > len(value):
        return _tensors_among(value, place, ignore), None
    if not found:
        ema = [name for name in _EMA if _is_state_dict(value.get(name))]
        also = f" (averaged weights alone: {', '.join(ema)})" if ema else ""
        raise CorruptFileError(
            f"{place} holds no weights under {', '.join(_STATE_DICTS)}{also}; it has "
            + listed(map(str, value))
        )
    return value[found[0]], value


def _tensors_among(
    value: Mapping[Any, Any], place: Path, ignore: Collection[str]
) -> dict[str, LazyTensor]:
    """Returns the tensors of a state dict that holds other entries too, if those are ignored."""
    tensors = {str(name): item for name, item in value.items() if isinstance(item, LazyTensor)}
    others = [str(name) for name in value if str(name) not in tensors]
    if wrong := [name for name in others if not is_ignored(name, ignore)]:
        raise CorruptFileError(
            f"{place}: {listed(wrong)} of its state dict is no tensor; leave it out with "
            f"`ignore_keys={wrong[0]}`"
        )
    return tensors


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
        target = declared or _recognised_target(raw, place, options)
    own = target.config_in(around)
    if own is not None:  # A given config may name single settings.
        config = {**own, **(config or {})}
    if config is None and manifest is not None and written_by == target.name:
        config = manifest.get("spec") if target.container == "torch" else None
    return target, config


def _recognised_target(raw: Tensors, place: Path, options: Options) -> Target:
    problem: InteropError | None = None
    for target in options.targets:
        try:
            names = cleaned(raw, _anchors(target), options.strip_prefix, options.ignore_keys)
            if target.recognises({name: tensor.shape for name, tensor in names.tensors.items()}):
                return target
        except (AmbiguousSourceError, CollidingKeysError) as error:
            # The anchor of one target may be part of another's names.
            problem = problem or type(error)(f"{place}: {error}", **error.details)
    if problem is not None:
        raise problem
    raise UnknownArchitectureError(
        f"{place}: no architecture that interop knows has tensors like {listed(raw)}; it reads "
        + ", ".join(target.name for target in options.targets)
        + "; if it is one of these, `kind=NAME` says what is missing"
    )


def _anchors(target: Target) -> list[tuple[str, str]]:
    """Returns the names that identify a target, with and without its optional prefix."""
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


def _images_in(
    place: Path, config: Mapping[str, Any] | None, manifest: Mapping[str, Any] | None
) -> ImageFormat | None:
    """Returns the image format in the config or the manifest, or None.

    Raises:
      CorruptFileError: it cannot be understood.
    """
    try:
        return images_of(config or {}) or images_of(manifest or {})
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise CorruptFileError(f"{place}: its `images` cannot be understood: {error!r}") from error


def _check_allowed(crossed: Mapping[str, str], allow_approx: Any, place: Path) -> None:
    allowed = Allowed.of(allow_approx)
    refused = {name: why for name, why in crossed.items() if not allowed.covers(name)}
    if refused:
        raise NotRepresentableError(
            f"{place} cannot be read exactly: {'; '.join(refused.values())}; "
            f"`allow_approx={','.join(refused)}` accepts that",
            reasons=list(refused.values()),
        )
