"""Opens a run: from a name or a path to its config, tokenizer, model and parameters.

import craft_jax.runs as runs
run = runs.open("outputs/models/my-run")
print(run.generate("def "))
"""

import dataclasses
import functools
import json
import logging
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from craft_jax import config as configs
from craft_jax import outputs, schema
from craft_jax.checkpoint.listing import Checkpoints
from craft_jax.checkpoint.lock import Pin
from craft_jax.checkpoint.store import CheckpointStore
from craft_jax.config import ExperimentConfig, Override, Weights
from craft_jax.data import tokenizers
from craft_jax.data.base import sizes_from
from craft_jax.data.images.format import ImageFormat
from craft_jax.data.pipeline import NO_TOKENIZER
from craft_jax.data.tokenizers import Tokenizer
from craft_jax.errors import ConfigError, DataError, StorageError, UsageError
from craft_jax.generation import beam_search, prompts
from craft_jax.generation.generator import Generator
from craft_jax.generation.images import ImageGenerator
from craft_jax.generation.sampling import SamplingConfig
from craft_jax.models import base
from craft_jax.models.base import ModelDef, Params, TokenModel
from craft_jax.outputs import RunPaths
from craft_jax.training.precision import Policy

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Run:
    """A checkpoint of a run, opened. Arrays are read when they are first needed.

    Attributes:
      paths: the run's files.
      step: of the checkpoint.
      config: the config that it was trained with, and overrides on top.
      given_tokenizer: used where the checkpoint has none.
      pin: keeps a trainer from removing the checkpoint.
      last: whether to use the parameters of the last update, even where there is an average.
    """

    paths: RunPaths
    step: int
    config: ExperimentConfig
    given_tokenizer: Tokenizer | None = None
    pin: Pin | None = None
    last: bool = False

    @property
    def store(self) -> CheckpointStore:
        """All checkpoints of the run."""
        return CheckpointStore(self.paths.checkpoints)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer that travels in the checkpoint, or the one that was given, or None."""
        file = self.store.tokenizer_file(self.step)
        return Tokenizer.load(file) if file else self.given_tokenizer

    def need_tokenizer(self) -> Tokenizer:
        """Returns the tokenizer.

        Raises:
          UsageError: the run has none.
        """
        if self.tokenizer is None:
            raise UsageError(f"run {self.paths.name}: {NO_TOKENIZER}")
        return self.tokenizer

    @functools.cached_property
    def meta(self) -> dict:
        """The metadata of the checkpoint: step, metrics, environment and so on."""
        return self.store.meta(self.step)

    @functools.cached_property
    def image_format(self) -> ImageFormat | None:
        """The format of the images that the model was trained on; None for other data."""
        found = self.meta.get("images")
        return None if found is None else ImageFormat.from_json(found)

    @functools.cached_property
    def model_def(self) -> ModelDef:
        """The model without its parameters."""
        sizes = sizes_from(self.meta["vocab_size"], self.image_format)
        return base.define(self.config.model_class, with_sizes(self.config.model, sizes))

    @functools.cached_property
    def params(self) -> Params:
        """The parameters as they were trained; their average, where the optimizer kept one."""
        return self.store.restore_params(self.step, self.model_def.shapes, last=self.last)

    @property
    def model(self) -> base.Model:
        """The model as a module, with its parameters."""
        return self.model_def.merge(self.params)

    @functools.cached_property
    def generator(self) -> Generator:
        """Continues prompts; compiled functions are kept between calls.

        Raises:
          UsageError: the model is no language model.
        """
        return make_generator(self.config, self.model_def, self.tokenizer)

    @functools.cached_property
    def compute_params(self) -> Params:
        """The parameters in the dtype that computes."""
        return Policy.named(self.config.training.precision).cast(self.params)

    def generate(
        self,
        prompt: str | Sequence[str] = "",
        *,
        max_new_tokens: int = 200,
        num_beams: int = 1,
        length_penalty: float = 0.0,
        seed: int = 0,
        **sampling: Any,
    ) -> Any:
        """Returns the prompt and its continuation; a list of them for a list of prompts.

        For a model of pairs the prompt is a source, and only its target is returned, the most
        likely one unless a temperature is given.

        Args:
          prompt: text; empty for a new document.
          max_new_tokens: how much is added.
          num_beams: more than 1 searches with this many beams instead of sampling.
          length_penalty: of the beams, see `Generator.beam_search`.
          seed: of the randomness.
          **sampling: see `SamplingConfig`.

        Raises:
          UsageError: an impossible value, or a prompt that the model cannot take.
        """
        if self.image_format is not None:
            raise UsageError(f"run {self.paths.name} makes images: use `generate_images`")
        tokenizer = self.need_tokenizer()
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        is_pair = self.config.reads_pairs
        rows = prompts.encode_prompts(tokenizer, texts, is_pair=is_pair)
        options = {"max_new_tokens": max_new_tokens, "sources": rows.sources}
        beam_search.check_beams(num_beams, length_penalty, [*sampling, *(["seed"] if seed else [])])
        if num_beams > 1:
            options |= {"num_beams": num_beams, "length_penalty": length_penalty}
            found = self.generator.beam_search(self.compute_params, rows.prompts, **options)
            made = [new for new, _ in found]
        else:
            config = SamplingConfig(**({"temperature": 0.0} if is_pair else {}) | sampling)
            made = self.generator.generate(
                self.compute_params, rows.prompts, config=config, seed=seed, **options
            )
        before = [""] * len(texts) if is_pair else texts
        parts = zip(before, rows.prompts, made, strict=True)
        texts = [text + tokenizer.continuation(new, ids, text) for text, ids, new in parts]
        return texts[0] if isinstance(prompt, str) else texts

    @functools.cached_property
    def image_generator(self) -> ImageGenerator:
        """Generates images; compiled functions are kept between calls.

        Raises:
          UsageError: the run is not one of images.
        """
        if self.image_format is None:
            raise UsageError(f"run {self.paths.name} is not one of images")
        return ImageGenerator(self.config.model_class, self.model_def, self.image_format)

    def generate_images(
        self, labels: Sequence[int | str], *, seed: int = 0, **options: Any
    ) -> np.ndarray:
        """Returns an image for each label, uint8 (N, H, W, C).

        Args:
          labels: numbers, or names, of classes; 0 for images without.
          seed: of the randomness.
          **options: see `ImageGenerator.generate`.

        Raises:
          UsageError: an impossible value, or a run that is not one of images.
        """
        make = self.image_generator
        numbers = [make.images.label(x) if isinstance(x, str) else x for x in labels]
        return make.generate(self.compute_params, numbers, seed=seed, **options)


def make_generator(
    config: ExperimentConfig,
    model_def: ModelDef,
    tokenizer: Tokenizer | None,
    *,
    stop_at_end: bool = True,
) -> Generator:
    """Returns what samples from a model.

    Args:
      config, model_def: the model.
      tokenizer: knows the end token, and how many ids stand for text; None if there is no text.
      stop_at_end: whether a sample ends with its document, or goes on with the next one.

    Raises:
      UsageError: the model is no language model.
    """
    if not issubclass(config.model_class, TokenModel):
        raise UsageError(f"model.name={config.model.name} is not a model that generates text")
    model = model_def.config
    return Generator(
        model_def,
        max_len=model.max_seq_len,
        vocab_size=tokenizer.vocab_size if tokenizer else model.vocab_size,
        end_id=tokenizer.end_id if tokenizer and stop_at_end else None,
    )


def with_sizes(model: Any, sizes: Mapping[str, int]) -> Any:
    """Returns a model config that fits data.

    Args:
      model: the config; fields that are None become those of the data.
      sizes: see `data.base.sizes_of`.

    Raises:
      ConfigError: it says something else than the data, or the data is of another kind.
    """
    name, is_of_images = model.name, "height" in sizes
    own = schema.values(model)
    if "vocab_size" in own and "vocab_size" not in sizes:
        remedy = (
            "make its images tokens with `config.data.image_colors=16`, or use model.name=flow"
            if is_of_images
            else "name text with data.path, or use a model of images"
        )
        raise ConfigError(f"model.name={name} reads tokens, and the data holds none; {remedy}")
    if own.get("height", 0) is None and not is_of_images:
        raise ConfigError(
            f"model.name={name} reads images, and the data holds none; use data.source=digits, or "
            "images with data.path, and leave data.image_colors out"
        )
    problems = []
    for field, size in sizes.items():
        wanted = own.get(field)
        if wanted is None or wanted == size or (field in _AT_LEAST and wanted > size):
            continue
        problems.append(
            f"model.{field}={wanted} is less than the {_AT_LEAST[field].format(size)} of the data; "
            "leave it out, or make it at least as large"
            if field in _AT_LEAST
            else f"model.{field}={wanted} is not {size}, which the data has; leave it out"
        )
    if problems:
        raise ConfigError(problems)
    unset = {field: size for field, size in sizes.items() if own.get(field, 0) is None}
    fitted = dataclasses.replace(model, **unset)
    if wrong := schema.contradictions(fitted):
        raise ConfigError(wrong)
    return fitted


_AT_LEAST = {"vocab_size": "{} tokens", "max_seq_len": "{} pixels of an image"}
"""Sizes of which a model may have more than the data."""


# Finding.


def open(
    run: str | Path,
    *,
    workdir: str | Path = "outputs",
    overrides: Sequence[Override] = (),
    tokenizer: str | Path | None = None,
    last: bool = False,
    checkpoint: str = "last",
) -> Run:
    """Opens the newest checkpoint of a run, or another one.

    Args:
      run: a name, `latest`, the path of a run, or the path of one of its checkpoints.
      workdir: where runs are looked up by name.
      overrides: laid over the saved config; not on what makes the model.
      tokenizer: the path of a `tokenizer.json`, or `byte`, for a model that came without one.
      last: use the parameters of the last update, even where there is an average of them.
      checkpoint: `last`, `best` (by `checkpoint.best_metric`), or a step.

    Raises:
      UsageError: there is no such checkpoint.
      ConfigError: a tokenizer is given, and the run has another one.
      DataError: there is no such run, or its tokenizer has more tokens than the model.
      StorageError: it has no checkpoint that can be read.
      ConfigError: an override is wrong, or not possible for a trained model.
    """
    folder, step = locate(str(run), Path(workdir))
    paths = outputs.open_run(folder)
    store = CheckpointStore(paths.checkpoints)
    step = named_step(store, step, checkpoint)
    step, pin = _pinned(store, step, paths.name)
    saved = store.config(step)
    config = configs.load(None, overrides, saved)
    refused = [
        f"{change.field}={change.now} cannot replace {change.saved}, which the run was trained with"
        for part in configs.changes(saved, config)
        for change in part
        if change.field.startswith("model.") or change.field == "data.tokenizer"
    ]
    if refused:
        raise ConfigError(refused)
    given = _stand_in(store, step, str(tokenizer), paths.name) if tokenizer is not None else None
    return Run(paths, step, config, given, pin, last)


def named_step(store: Checkpoints, step: int | None, checkpoint: str) -> int | None:
    """Returns the step that a path or the option `checkpoint` names; None for the newest.

    Raises:
      UsageError: both do, or there is no such checkpoint.
    """
    if step is not None and checkpoint != "last":
        raise UsageError(
            f"`run` names the checkpoint of step {step}; leave `checkpoint={checkpoint}` out"
        )
    return step if step is not None else store.named(checkpoint)


def _pinned(store: CheckpointStore, step: int | None, name: str) -> tuple[int, Pin]:
    """Pins a checkpoint that is as it was written, the newest if `step` is None.

    Another process may be adding checkpoints, and removing old ones.
    """
    while True:
        bad: dict[int, str] = {}
        chosen = step
        if step is None:
            chosen, bad = store.newest_good()
        elif not (store.folder / str(step)).is_dir():
            raise StorageError(f"run {name} has no checkpoint of step {step}; {_have(store)}")
        elif wrong := store.wrong(step):
            bad = {step: wrong}
        damaged = "; ".join(f"checkpoint step {s} is damaged ({why})" for s, why in bad.items())
        if chosen is None or chosen in bad:
            raise StorageError(
                f"run {name}: {damaged}; {_have(store, bad)}"
                if bad
                else f"run {name} has no checkpoint yet; train it with `run={name}`"
            )
        pin = store.pin(chosen)
        if pin is not None:
            if damaged:
                logger.warning("run %s: %s; using step %d", name, damaged, chosen)
            return chosen, pin


def _have(store: CheckpointStore, bad: Collection[int] = ()) -> str:
    good = [str(step) for step in store.steps() if step not in bad]
    return f"it has {', '.join(good)}" if good else "it has no other"


def _stand_in(store: CheckpointStore, step: int, tokenizer: str, name: str) -> Tokenizer:
    """Opens the tokenizer that is given for a run without one."""
    opened = tokenizers.open_fixed(tokenizer)
    if own_file := store.tokenizer_file(step):
        own = Tokenizer.load(own_file)
        if own.digest != opened.digest:
            raise ConfigError(
                f"`tokenizer={tokenizer}` (digest {opened.digest[:16]}) is not the tokenizer of "
                f"run {name} (digest {own.digest[:16]}); leave it out: the run has its own"
            )
        return own
    rows = store.meta(step)["vocab_size"]
    if opened.vocab_size > rows:
        raise DataError(
            f"`tokenizer={tokenizer}` has {opened.vocab_size} tokens, but the model of run {name} "
            f"knows {rows}; it is not the tokenizer that the model was trained with"
        )
    return opened


def weights(init_from: str, workdir: Path) -> tuple[Run, Weights]:
    """Opens the run whose weights and tokenizer a new run begins with.

    Args:
      init_from: a name, `latest`, or a path, as for `open`.
      workdir: where runs are looked up by name.

    Raises:
      DataError, StorageError: see `open`.
    """
    try:
        run = open(init_from, workdir=workdir)
    except DataError as error:
        path = Path(init_from).expanduser()
        if path.exists() and not (path / "run.json").exists():
            raise DataError(
                f"init_from={init_from} is no run of craft_jax; bring it over with "
                f"`python -m interop import {init_from} {workdir / 'models' / 'NAME'}`"
            ) from None
        reason = str(error).replace(f"`run={init_from}`", f"init_from={init_from}")
        raise DataError(reason) from None
    file = run.store.tokenizer_file(run.step)
    model = dataclasses.asdict(run.model_def.config)
    return run, Weights(init_from, model, str(file) if file else None)


def locate(run: str, workdir: Path) -> tuple[Path, int | None]:
    """Returns the folder of a run that exists, and the step if a checkpoint was named.

    Raises:
      DataError: there is none; names those that are.
    """
    if run == "latest":
        existing = outputs.all_runs(workdir)
        if not existing:
            raise DataError(f"`run=latest`: there is no run below {workdir / 'models'}; train one")
        return existing[-1].absolute(), None
    for place in (workdir / "models" / run, Path(run).expanduser()):
        path = place.absolute()
        if (path / "run.json").is_file():
            return path, None
        if path.name.isdecimal() and (path.parent.parent / "run.json").is_file():
            return path.parent.parent, int(path.name)
    names = [folder.name for folder in outputs.all_runs(workdir)[-5:]]
    have = f"the newest are {', '.join(names)}" if names else "there are none"
    raise DataError(f"`run={run}`: no such run below {workdir / 'models'}; {have}")


def exists(run: str, workdir: Path) -> bool:
    """Returns whether a run exists; a new name may be created.

    Raises:
      DataError: `latest` where there is none, or a path that is missing.
    """
    try:
        locate(run, workdir)
    except DataError:
        if run == "latest" or os.sep in run:
            raise
        return False
    return True


def saved_config(paths: RunPaths) -> dict:
    """Returns the config that a run began with.

    Raises:
      StorageError: it cannot be read.
    """
    try:
        return json.loads(paths.config.read_text(encoding="utf-8", errors="surrogateescape"))
    except (OSError, ValueError) as error:
        raise StorageError(f"{paths.config} cannot be read: {error}") from error
