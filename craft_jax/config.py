"""From a config file and overrides to typed dataclasses, and every mistake on the way.

`ConfigDict` ends here: a file in `configs/` returns one, and what leaves this module is an
`ExperimentConfig`. Its sections are dataclasses that stand beside the code that reads them; their
defaults hold for whatever a file leaves out. All mistakes are collected, from the file, from the
command line, and between fields, and raised as one `ConfigError`.
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from craft_jax import fields, models, plugins, schema
from craft_jax.checkpoint.settings import CheckpointConfig
from craft_jax.config_file import read_file
from craft_jax.data import pipeline
from craft_jax.data.pair_sources import TASKS
from craft_jax.data.pipeline import is_pairs_path, is_tokenizer_path
from craft_jax.data.settings import DataConfig
from craft_jax.data.tokenizers import KINDS
from craft_jax.errors import ConfigError, UsageError
from craft_jax.fields import Assignments, Override
from craft_jax.messages import shown, suggest
from craft_jax.models import MODELS
from craft_jax.models.base import EncoderDecoderModel, Model
from craft_jax.models.losses import LossConfig
from craft_jax.parallel.sharding import ParallelConfig
from craft_jax.schema import Contradiction, setting
from craft_jax.training.early_stopping import EarlyStoppingConfig
from craft_jax.training.loggers import LogConfig
from craft_jax.training.optim import OptimConfig
from craft_jax.training.plateau import PlateauConfig
from craft_jax.training.profiling import ProfileConfig
from craft_jax.training.settings import TrainingConfig
from craft_jax.values import coerce, parse, types_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """One training run, complete.

    Attributes:
      init_from: the run whose weights and tokenizer this one began with, or None.
      model: the `Config` of the class that `model.name` names.
      data, optim, training, parallel, loss, plateau, early_stopping, checkpoint, log, profile: the
        other sections.
    """

    init_from: str | None = setting(
        None, "a run, or one of its checkpoints, whose weights and tokenizer a new run begins with"
    )
    model: Any
    data: DataConfig
    optim: OptimConfig
    training: TrainingConfig
    parallel: ParallelConfig
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    plateau: PlateauConfig = dataclasses.field(default_factory=PlateauConfig)
    early_stopping: EarlyStoppingConfig = dataclasses.field(default_factory=EarlyStoppingConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    log: LogConfig = dataclasses.field(default_factory=LogConfig)
    profile: ProfileConfig = dataclasses.field(default_factory=ProfileConfig)

    @property
    def model_class(self) -> type[Model]:
        """The class that `model.name` names."""
        return model_class(self.model.name)

    def contradictions(self) -> Iterator[Contradiction]:
        """Yields what is wrong between sections."""
        data, optim, training = self.data, self.optim, self.training
        model = schema.values(self.model)
        longest = model.get("max_seq_len")
        is_of_images = data.image_colors is not None or data.source in ("digits", "images")
        if longest is not None and data.seq_len > longest and not is_of_images:
            yield Contradiction(
                ("data.seq_len", "model.max_seq_len"),
                f"data.seq_len={data.seq_len} is longer than model.max_seq_len={longest}; "
                f"use data.seq_len={longest} or more positions",
            )
        if data.batch_size % training.accumulate:
            yield Contradiction(
                ("data.batch_size", "training.accumulate"),
                f"training.accumulate={training.accumulate} does not divide "
                f"data.batch_size={data.batch_size}; choose a divisor",
            )
        if optim.decay_steps is None and (optim.warmup_steps or 0) > training.num_steps:
            yield Contradiction(
                ("optim.warmup_steps", "training.num_steps"),
                f"optim.warmup_steps={optim.warmup_steps} is more than "
                f"training.num_steps={training.num_steps}; warm up in fewer steps",
            )
        early, best = self.early_stopping, self.checkpoint
        if early.patience and early.restore_best and early.monitor != best.best_metric:
            yield Contradiction(
                ("early_stopping.monitor", "checkpoint.best_metric"),
                f"early_stopping.monitor={early.monitor} is not checkpoint.best_metric="
                f"{best.best_metric}, whose best checkpoint stays; make them the same, or set "
                "early_stopping.restore_best=false",
            )
        vocab = model.get("vocab_size")
        if vocab is not None and data.tokenizer == "bpe" and data.vocab_size > vocab:
            yield Contradiction(
                ("data.vocab_size", "model.vocab_size"),
                f"data.vocab_size={data.vocab_size} is more than model.vocab_size={vocab}; "
                "leave model.vocab_size out, or make it at least as large",
            )
        if wrong := self._wrong_pairs:
            yield Contradiction(("model.name", "data.pairs"), wrong)

    @property
    def reads_pairs(self) -> bool:
        """Returns whether the model reads a source and writes a target."""
        return issubclass(self.model_class, EncoderDecoderModel)

    def check_pairs(self) -> None:
        """Checks that model and data are both of pairs, or neither is.

        A run that was imported names no data yet, so its saved config is not checked for this.

        Raises:
          UsageError: they are not.
        """
        if wrong := self._wrong_pairs:
            raise UsageError(wrong)

    @property
    def _wrong_pairs(self) -> str | None:
        name, data = self.model.name, self.data
        if data.pairs and not self.reads_pairs:
            return (
                f"model.name={name} does not read data.pairs={data.pairs}; use model.name=seq2seq, "
                "or leave data.pairs out"
            )
        if self.reads_pairs and not (data.pairs or data.dataset):
            return (
                f"model.name={name} reads pairs, but data.pairs is empty: name yours with "
                f"`config.data.pairs=PATH`, or one of {', '.join(TASKS)}"
            )
        return None

    def to_json(self) -> dict[str, Any]:
        """Returns the config as plain JSON, section by section."""

        def plain(value: Any) -> Any:
            if isinstance(value, dict):
                return {k: plain(v) for k, v in value.items()}
            return list(value) if isinstance(value, tuple) else value

        return plain(dataclasses.asdict(self))


SECTIONS = tuple(f.name for f in dataclasses.fields(ExperimentConfig) if f.name != "init_from")
"""The sections of a config; `init_from` is the only field outside of one."""


def model_class(name: str) -> type[Model]:
    """Returns the class that `model.name` names.

    Raises:
      ConfigError: there is none.
    """
    if name in MODELS:
        return models.model_class(name)
    if plugins.is_reference(name):
        found = plugins.load(name, "model.name", Model)
        is_section = dataclasses.is_dataclass(found.Config)
        if not (is_section and "name" in schema.defaults(found.Config)):
            raise ConfigError(
                f"model.name={name}: {found.__name__}.Config must be a dataclass, with a default "
                "for its field `name`"
            )
        return found
    raise ConfigError(
        f"model.name={shown(name)} is not one of {', '.join(MODELS)}, nor a class as "
        f"path/file.py:Class{suggest(name, MODELS)}"
    )


# Reading.


def load(
    file: str | None,
    overrides: Sequence[Override] = (),
    saved: Mapping | None = None,
    weights: Callable[[str | None], "Weights | None"] = lambda init_from: None,
) -> ExperimentConfig:
    """Builds the config of a run.

    Args:
      file: `path.py` or `path.py:preset`; None to start from `saved`.
      overrides: laid over it, in order.
      saved: the JSON of an earlier config.
      weights: given `init_from`, returns what the run begins with; None for fresh weights.

    Raises:
      ConfigError: one line for each mistake.
    """
    is_saved = file is None
    given = {override.field: override.text for override in overrides}
    values = dict((saved or {}) if is_saved else read_file(file, given))
    init_from = values.get("init_from")
    if "init_from" in given:
        with contextlib.suppress(ValueError):  # The check of all fields names it.
            init_from = parse(given["init_from"], str | None)
    found = weights(init_from if isinstance(init_from, str) else None)
    if found:
        values["model"] = found.model
        data = values.get("data")
        values["data"] = (data if isinstance(data, Mapping) else {}) | {
            "tokenizer": found.tokenizer
        }
    config = from_values(
        values, overrides, "the saved config" if is_saved else file, check_files=not is_saved
    )
    if found and (wrong := _at_odds(found, config)):
        raise ConfigError(wrong)
    return config


def flat(file: str | None, overrides: Sequence[Override] = ()) -> dict[str, str]:
    """Returns what a config file and overrides set, by field, as text: to be compared.

    Raises:
      ConfigError: the file cannot be used.
    """
    values = read_file(file) if file else {}
    flat = {name: repr(value) for name, value in _flatten(values).items()}
    return flat | {override.field: override.text for override in overrides}


class Weights(NamedTuple):
    """The settings that a run inherits with the weights of another.

    Attributes:
      origin: where they come from, for messages.
      model: the `model` section that they were trained with.
      tokenizer: what `data.tokenizer` is then; None where the weights come without one.
    """

    origin: str
    model: Mapping[str, Any]
    tokenizer: str | None


def _at_odds(weights: Weights, config: ExperimentConfig) -> list[str]:
    """Returns one line for each override of the model that these weights cannot take."""
    return [
        f"model.{name}={now!r} differs from {weights.model[name]!r}, with which the weights of "
        f"{weights.origin} were trained; leave it out"
        for name, now in config.to_json()["model"].items()
        if name != "dropout" and weights.model.get(name, now) != now
    ]


def from_values(
    values: Mapping[str, Any],
    overrides: Sequence[Override] = (),
    origin: str | None = None,
    check_files: bool = True,
) -> ExperimentConfig:
    """Builds a config from a dict of sections, and overrides on top.

    Args:
      values: the sections.
      overrides: laid over them, in order.
      origin: where the values come from, for messages.
      check_files: whether a tokenizer's file must exist; a saved run has a copy of its own.

    Raises:
      ConfigError: one line for each mistake.
    """
    assigned, classes = _assigned(values, overrides, origin or "the config")
    values_of = {section: assigned.section(section) for section in classes}
    missing = [
        f"{section}.{field.name}"
        for section, cls in classes.items()
        for field in dataclasses.fields(cls)
        if field.name not in values_of[section] and not _has_default(field)
    ]
    if missing:
        new = [field for field in missing if field not in assigned.bad_fields]
        assigned.add_mistakes("", *(f"{field} has no default; give it a value" for field in new))
        raise ConfigError(assigned.mistakes)
    sections = _absolute({s: cls(**values_of[s]) for s, cls in classes.items()})
    if check_files:
        for field, problem in _missing_files(sections["data"], sections["training"]):
            assigned.add_mistakes(field, problem)
    for section, value in sections.items():
        for field, problem in schema.out_of_bounds(value, section):
            assigned.add_mistakes(field, problem)
    bad = assigned.bad_fields
    config = ExperimentConfig(
        init_from=assigned.values.get("init_from"),
        **{section: schema.repaired(value, section, bad) for section, value in sections.items()},
    )
    # A run that was imported names no text yet.
    not_checked = bad if check_files else bad | {"data.path", "data.pairs"}
    for part in (*(getattr(config, section) for section in sections), config):
        assigned.add_mistakes("", *schema.contradictions(part, not_checked))
    if assigned.mistakes:
        raise ConfigError(assigned.mistakes)
    return config


def find_field(name: str, *, is_exact: bool) -> str | None:
    """Returns the field of a config with a GPT that a name means; see `fields.find_field`."""
    return fields.find_field(name, _assigned({}, (), "")[0].types, is_exact=is_exact)


def _assigned(
    values: Mapping[str, Any], overrides: Sequence[Override], origin: str
) -> tuple[Assignments, dict[str, type]]:
    """Returns the values of all fields that were set, and the class of each section."""
    flat = _flatten(values)
    given = {override.field: override.text for override in overrides}
    model, wrong_model = models.model_class("gpt"), []
    try:
        model = model_class(coerce(given.get("model.name", flat.get("model.name", "gpt")), str))
    except ValueError:  # Assigning it says so.
        pass
    except ConfigError as error:
        wrong_model = error.problems
    section_types = types_of(ExperimentConfig) | {"model": model.Config}
    classes = {section: section_types[section] for section in SECTIONS}
    types = {f"{s}.{name}": kind for s in SECTIONS for name, kind in types_of(classes[s]).items()}
    assigned = Assignments(types | {"init_from": section_types["init_from"]})
    assigned.add_mistakes("model.name", *wrong_model)
    for field, value in flat.items():
        if field in SECTIONS:
            problem = f"{origin}: {field}={shown(value)} must be a section with fields"
            assigned.add_mistakes(field, problem)
        else:
            assigned.assign(field, value, coerce, origin)
    for field, text in given.items():
        assigned.assign(field, text, parse, "`config`")
    return assigned, classes


def _flatten(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values of all sections by the full names of their fields."""
    flat = {}
    for name, content in values.items():
        if isinstance(content, Mapping):
            flat |= {f"{name}.{field}": value for field, value in content.items()}
        else:
            flat[name] = content
    return flat


def _has_default(field: dataclasses.Field) -> bool:
    return field.default is not field.default_factory  # Both are MISSING where there is none.


def _missing_files(data: DataConfig, training: TrainingConfig) -> Iterator[tuple[str, str]]:
    """Yields each field that names a file or class that does not exist, and the problem."""
    for field, value, is_path, names in (
        ("data.tokenizer", data.tokenizer, is_tokenizer_path, KINDS),
        ("data.pairs", data.pairs, is_pairs_path, TASKS),
    ):
        if value and is_path(value) and not os.path.exists(value):
            name = os.path.basename(value)
            listed = ", ".join(names)
            hint = suggest(name, names)
            yield field, f"{field}={shown(name)} is not one of {listed}, nor a file{hint}"
    classes = [("training.callbacks", reference) for reference in training.callbacks]
    for field, reference in [("data.dataset", data.dataset), *classes]:
        place, _, name = (reference or "").rpartition(":")
        if reference and not (place and name):
            problem = f"{reference!r} names no class; write path/file.py:Class or module:Class"
            yield field, f"{field}={problem}"
        elif place.endswith(".py") and not os.path.isfile(place):
            yield field, f"{field}={reference}: no such file; give its path from {Path.cwd()}"


def _absolute(sections: Mapping[str, Any]) -> dict[str, Any]:
    """Makes paths absolute, so that a run can be continued from another folder."""
    model, data, training = sections["model"], sections["data"], sections["training"]
    if plugins.is_reference(model.name):
        model = dataclasses.replace(model, name=_absolute_class(model.name))
    data = pipeline.with_paths(data, _absolute_path)
    if data.dataset:
        data = dataclasses.replace(data, dataset=_absolute_class(data.dataset))
    if plugins.is_reference(data.source):
        data = dataclasses.replace(data, source=_absolute_class(data.source))
    callbacks = tuple(map(_absolute_class, training.callbacks))
    training = dataclasses.replace(training, callbacks=callbacks)
    return dict(sections) | {"model": model, "data": data, "training": training}


def _absolute_path(path: str) -> str:
    # Unlike its namesake of pathlib, this `expanduser` leaves the home of nobody as it is.
    return str(Path(os.path.expanduser(path)).absolute())


def _absolute_class(reference: str) -> str:
    with contextlib.suppress(RuntimeError):  # The home of nobody, or links in a circle.
        return plugins.absolute(reference)
    return reference


# Comparing.


class Change(NamedTuple):
    """A field that differs from a saved config."""

    field: str
    saved: Any
    now: Any


def changes(
    saved: Mapping[str, Any], config: ExperimentConfig
) -> tuple[list[Change], list[Change]]:
    """Compares a config with the saved one of its run.

    Returns:
      The changes with which the run may be resumed, and those with which it may not.
    """
    allowed, refused = [], []
    before = _flatten(saved)
    for field, value in _flatten(config.to_json()).items():
        change = Change(field, before.get(field, value), value)
        if change.saved != change.now:
            (allowed if _is_resumable(field, config) else refused).append(change)
    return allowed, refused


def _is_resumable(field: str, config: ExperimentConfig) -> bool:
    """Returns whether the run of a config may be resumed with another value of a field."""
    section, _, name = field.partition(".")
    if section not in SECTIONS:
        return False
    fields = dataclasses.fields(getattr(config, section))
    metadata = next(f.metadata for f in fields if f.name == name)
    if section == "data" and config.data.allow_change and not metadata["keeps_vocabulary"]:
        return True
    return metadata.get("resumable", False)
