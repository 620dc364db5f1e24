"""From a config file and overrides to typed dataclasses, and every mistake on the way.

`ConfigDict` ends here: a file in `configs/` returns one, and what leaves this module is an
`ExperimentConfig`. Its sections are dataclasses that stand beside the code that reads them; their
defaults hold for whatever a file leaves out. All mistakes are collected, from the file, from the
command line, and between fields, and raised as one `ConfigError`.
"""

import contextlib
import dataclasses
import difflib
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from craft_jax import models, plugins, schema
from craft_jax.checkpoint.store import CheckpointConfig
from craft_jax.data import pipeline
from craft_jax.data.pair_sources import TASKS
from craft_jax.data.pipeline import is_pairs_path, is_tokenizer_path
from craft_jax.data.settings import DataConfig
from craft_jax.data.tokenizers import KINDS
from craft_jax.errors import ConfigError, UsageError
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
from craft_jax.values import coerce, cut, parse, shown, types_of

# What users of other frameworks type, for "did you mean".
_ALIASES = {
    "n_layer": "num_layers",
    "n_layers": "num_layers",
    "n_head": "num_heads",
    "n_heads": "num_heads",
    "n_embd": "d_model",
    "hidden_size": "d_model",
    "block_size": "max_seq_len",
    "context_length": "max_seq_len",
    "lr": "learning_rate",
    "min_lr": "min_learning_rate",
    "max_iters": "num_steps",
    "max_steps": "num_steps",
    "warmup_iters": "warmup_steps",
    "lr_decay_iters": "decay_steps",
    "grad_clip": "clip_norm",
    "eval_interval": "eval_every",
    "log_interval": "log_every",
    "dtype": "precision",
    "gradient_accumulation_steps": "accumulate",
}


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
        longest = getattr(self.model, "max_seq_len", None)
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
        vocab = getattr(self.model, "vocab_size", None)
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
        """Whether the model reads a source and writes a target."""
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
                f"--config.data.pairs=PATH, or one of {', '.join(TASKS)}"
            )
        return None

    def to_json(self) -> dict[str, Any]:
        """Returns the config as plain JSON, section by section."""

        def plain(value: Any) -> Any:
            if isinstance(value, dict):
                return {k: plain(v) for k, v in value.items()}
            return list(value) if isinstance(value, tuple) else value

        return plain(dataclasses.asdict(self))


_TOP = "init_from"
SECTIONS = tuple(f.name for f in dataclasses.fields(ExperimentConfig) if f.name != _TOP)
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
        config = getattr(found, "Config", None)
        if not (dataclasses.is_dataclass(config) and hasattr(config, "name")):
            raise ConfigError(
                f"model.name={name}: {found.__name__}.Config must be a dataclass, with a default "
                "for its field `name`"
            )
        return found
    close = difflib.get_close_matches(name, MODELS, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ConfigError(
        f"model.name={shown(name)} is not one of {', '.join(MODELS)}, nor a class as "
        f"path/file.py:Class{hint}"
    )


class Override(NamedTuple):
    """A `--config.section.field=value` of the command line.

    Attributes:
      field: `section.field`.
      text: the text after the equals sign.
    """

    field: str
    text: str


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
    values = dict((saved or {}) if is_saved else read_file(file))
    given = {override.field: override.text for override in overrides}
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
    found = {name: repr(value) for name, value in _flatten(values, _Mistakes(), file or "")}
    return found | {override.field: override.text for override in overrides}


class Weights(NamedTuple):
    """What a run that begins with the weights of another takes over with them.

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


def read_file(reference: str) -> dict[str, Any]:
    """Runs `get_config` of a config file and returns its values as a dict.

    Args:
      reference: `path.py`, or `path.py:preset`; the preset is the argument of `get_config`.

    Raises:
      ConfigError: the file is missing, fails, or returns something else.
    """
    path, _, preset = reference.partition(":")
    here = f"--config={cut(reference)}"
    if os.path.isdir(path):
        raise ConfigError(f"{here}: this is a folder; name a Python file in it")
    if not os.path.isfile(path):
        raise ConfigError(f"{here}: no such file; the current folder is {Path.cwd()}")
    spec = importlib.util.spec_from_file_location("craft_jax_config", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{here}: not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
    try:
        spec.loader.exec_module(module)
        if not callable(getattr(module, "get_config", None)):
            raise ConfigError(f"{here}: the file has no function get_config()")
        config = module.get_config(preset) if preset else module.get_config()
        if not isinstance(config, ConfigDict):
            kind = type(config).__name__
            raise ConfigError(f"{here}: get_config() returned {kind}, not ConfigDict")
        return config.to_dict()
    except ConfigError:
        raise
    except SyntaxError as error:
        place = f"{error.filename or path} line {error.lineno or '?'}"
        raise ConfigError(_one_line(f"{here}: {place}: {error.msg}")) from error
    except (Exception, SystemExit) as error:
        what = f"{type(error).__name__}: {error}"
        raise ConfigError(_one_line(f"{here}: {_line_of(error, path)}{what}")) from error
    finally:
        sys.dont_write_bytecode = before


def _line_of(error: BaseException, path: str) -> str:
    """Returns `line 3: ` for an error that passed through a file, else nothing."""
    own = os.path.realpath(path)
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if os.path.realpath(frame.filename) == own]
    return f"line {lines[-1]}: " if lines else ""


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
    found = _Mistakes()
    flat = dict(_flatten(values, found, origin or "the config"))
    cli = {override.field: override.text for override in overrides}
    model = models.model_class("gpt")
    try:
        model = model_class(coerce(cli.get("model.name", flat.get("model.name", "gpt")), str))
    except ValueError:  # `_assign` says so.
        pass
    except ConfigError as error:
        found.add("model.name", *error.problems)
    classes = {
        field.name: model.Config if field.name == "model" else field.type
        for field in dataclasses.fields(ExperimentConfig)
        if field.name in SECTIONS
    }
    chosen: dict[str, dict[str, Any]] = {section: {} for section in ("", *classes)}
    for source, assignments, read in (
        (origin, flat.items(), coerce),
        ("--config", cli.items(), parse),
    ):
        for field, raw in assignments:
            _assign(chosen, classes, field, raw, read, found, source)
    missing = [
        f"{section}.{field.name}"
        for section, cls in classes.items()
        for field in dataclasses.fields(cls)
        if field.name not in chosen[section] and not _has_default(field)
    ]
    if missing:
        new = [field for field in missing if field not in found.fields]
        found.add("", *(f"{field} has no default; give it a value" for field in new))
        raise ConfigError(found.lines)
    sections = {s: cls(**chosen[s]) for s, cls in classes.items()}
    if plugins.is_reference(sections["model"].name):
        absolute = _absolute_class(sections["model"].name)
        sections["model"] = dataclasses.replace(sections["model"], name=absolute)
    sections["data"], sections["training"] = _absolute(sections["data"], sections["training"])
    if check_files:
        found.add("data.tokenizer", *_missing_tokenizer(sections["data"].tokenizer))
        found.add("data.pairs", *_missing_pairs(sections["data"].pairs))
        found.add("data.dataset", *_missing_class("data.dataset", sections["data"].dataset))
        for callback in sections["training"].callbacks:
            found.add("training.callbacks", *_missing_class("training.callbacks", callback))
    for section, value in sections.items():
        for field, problem in schema.out_of_bounds(value, section):
            found.add(field, problem)
    config = ExperimentConfig(
        **chosen[""],
        **{s: schema.repaired(value, s, found.fields) for s, value in sections.items()},
    )
    # A run that was imported names no text yet.
    not_checked = found.fields if check_files else found.fields | {"data.path", "data.pairs"}
    for part in (*(getattr(config, section) for section in sections), config):
        found.add("", *schema.contradictions(part, not_checked))
    if found.lines:
        raise ConfigError(found.lines)
    return config


def _has_default(field: dataclasses.Field) -> bool:
    return field.default is not field.default_factory  # Both are MISSING where there is none.


def _missing_tokenizer(tokenizer: str | None) -> Iterator[str]:
    if tokenizer and is_tokenizer_path(tokenizer) and not os.path.exists(tokenizer):
        name = os.path.basename(tokenizer)
        close = difflib.get_close_matches(name, KINDS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        yield f"data.tokenizer={shown(name)} is not one of {', '.join(KINDS)}, nor a file{hint}"


def _missing_pairs(pairs: str | None) -> Iterator[str]:
    if pairs and is_pairs_path(pairs) and not os.path.exists(pairs):
        name = os.path.basename(pairs)
        close = difflib.get_close_matches(name, TASKS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        yield f"data.pairs={shown(name)} is not one of {', '.join(TASKS)}, nor a file{hint}"


def _missing_class(field: str, reference: str | None) -> Iterator[str]:
    """Yields what is wrong with the name of a class, as far as it shows without importing it."""
    if not reference:
        return
    place, _, name = reference.rpartition(":")
    if not (place and name):
        yield f"{field}={reference!r} names no class; write path/file.py:Class or module:Class"
    elif place.endswith(".py") and not os.path.isfile(place):
        yield f"{field}={reference}: no such file; give its path from {Path.cwd()}"


class _Mistakes:
    """Collects problems, and which fields they are about."""

    def __init__(self) -> None:
        self.fields: set[str] = set()
        self.lines: list[str] = []

    def add(self, field: str, *problems: str) -> None:
        if problems and field:
            self.fields.add(field)
        self.lines += map(_one_line, problems)


def _one_line(text: str) -> str:
    """Returns a text without line breaks."""
    return " ".join(text.split())


def _flatten(values: Mapping[str, Any], found: _Mistakes, origin: str) -> Iterator[tuple[str, Any]]:
    for section, content in values.items():
        if isinstance(content, Mapping):
            yield from ((f"{section}.{name}", value) for name, value in content.items())
        elif section in SECTIONS:
            found.add(
                section, f"{origin}: {section}={shown(content)} must be a section with fields"
            )
        else:
            yield section, content


def _assign(
    chosen: dict[str, dict[str, Any]],
    classes: Mapping[str, type],
    field: str,
    raw: Any,
    read: Callable[[Any, Any], Any],
    found: _Mistakes,
    source: str | None,
) -> None:
    """Puts one value where it belongs, or notes why it cannot be."""
    section, _, name = field.rpartition(".")
    if not section:
        types_ = {name: kind for name, kind in types_of(ExperimentConfig).items() if name == _TOP}
    else:
        types_ = types_of(classes[section]) if section in classes else {}
    if name not in types_:
        found.add(field, f"{source}: {_unknown(field, classes)}")
        return
    try:
        chosen[section][name] = read(raw, types_[name])
    except ValueError as error:
        found.add(field, f"{field}={shown(raw)} {error} (in {source})")


def _unknown(field: str, classes: Mapping[str, type]) -> str:
    if not field.strip("."):
        return "a field has no name; write --config.SECTION.FIELD=VALUE"
    section, _, name = field.rpartition(".")
    if not section:
        section, name = name, ""
    known = {s: list(types_of(cls)) for s, cls in classes.items()}
    everywhere = {n: f"{s}.{n}" for s, names in known.items() for n in names}
    if section not in known:
        close = difflib.get_close_matches(section, known, n=1)
        if close and name:
            hint = f"did you mean `{close[0]}.{name}`?"
        elif (alias := _ALIASES.get(section, section)) in everywhere:
            hint = f"did you mean `{everywhere[alias]}`?"
        else:
            hint = f"the sections are {', '.join(known)}"
        return f"{field} is no field; {hint}"
    own = known[section]
    if not name:
        return f"{section} is a section: name one of its fields, {', '.join(own)}"
    alias = _ALIASES.get(name, name)
    if alias in own:
        hint = f"did you mean `{alias}`?"
    elif close := difflib.get_close_matches(name, own, n=1, cutoff=0.6):
        hint = f"did you mean `{close[0]}`?"
    elif alias in everywhere:
        hint = f"did you mean `{everywhere[alias]}`?"
    else:
        hint = f"{section} has {', '.join(own)}"
    return f"{field} is no field; {hint}"


def _absolute(data: DataConfig, training: TrainingConfig) -> tuple[DataConfig, TrainingConfig]:
    """Makes paths absolute, so that a run can be continued from another folder."""
    changes: dict[str, Any] = {}
    if data.dataset:
        changes["dataset"] = _absolute_class(data.dataset)
    if plugins.is_reference(data.source):
        changes["source"] = _absolute_class(data.source)
    callbacks = tuple(map(_absolute_class, training.callbacks))
    return (
        dataclasses.replace(pipeline.with_paths(data, _absolute_path), **changes),
        dataclasses.replace(training, callbacks=callbacks),
    )


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
    for section, values in config.to_json().items():
        if section not in SECTIONS:
            pairs = [(section, saved.get(section, values), values)]
        else:
            old = saved.get(section, {})
            pairs = [(f"{section}.{name}", old.get(name, v), v) for name, v in values.items()]
        for field, before, value in pairs:
            if before != value:
                is_allowed = _is_resumable(field, config)
                (allowed if is_allowed else refused).append(Change(field, before, value))
    return allowed, refused


def _is_resumable(field: str, config: ExperimentConfig) -> bool:
    """Whether the run of a config may be resumed with another value of a field."""
    section, _, name = field.partition(".")
    facts = getattr(config, section, None)
    if not dataclasses.is_dataclass(facts):
        return False
    metadata = next(f.metadata for f in dataclasses.fields(facts) if f.name == name)
    if section == "data" and config.data.allow_change and not metadata["keeps_vocabulary"]:
        return True
    return metadata.get("resumable", False)
