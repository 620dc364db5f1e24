"""From the `data` section of a config to datasets.

    source -> tokenizer -> token cache -> splits -> rows -> batches by number

`prepare` builds the caches; `open_datasets` returns the batches of all splits: of text, of pairs of
text, of images, or of a dataset class of the user's own.
"""

import contextlib
import dataclasses
import hashlib
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from craft_jax import plugins
from craft_jax.data import examples, pair_sources, pairs, text
from craft_jax.data.base import Dataset, DatasetInfo, Recipe
from craft_jax.data.cache import builder
from craft_jax.data.partition import SPLIT_WORDS, Prepared, SplitPart, partition
from craft_jax.data.rows import DocumentRows, RandomWindows, Rows, Stream, Windows
from craft_jax.data.sampling import mix
from craft_jax.data.settings import DataConfig, MixtureComponent, mixture_of
from craft_jax.data.sources import custom, files
from craft_jax.data.sources.documents import Source, one_line
from craft_jax.data.tokenizers import KINDS, Tokenizer, vocabulary
from craft_jax.errors import ConfigError, CraftError, DataError, UsageError

NO_TOKENIZER = "the model has no tokenizer; name one with `tokenizer=PATH`"
_MAX_NAME = 60


class Datasets(NamedTuple):
    """The splits; `val` and `test` are None where nothing is held out."""

    train: Dataset
    val: Dataset | None = None
    test: Dataset | None = None


# Sources.


def open_source(
    config: DataConfig, kind: str, place: str | None, split: str, field: str = "data.path"
) -> Source:
    """Opens one source of text.

    Args:
      config: how it is read.
      kind: as `DataConfig.source`, without `auto`.
      place: a path, or the name of a dataset.
      split: of a dataset that has several.
      field: the config field that names `place`, for messages about files.

    Raises:
      DataError: it is missing, or cannot be read.
      ConfigError: it is a class that cannot be used.
    """
    if kind == "stdlib":
        return files.open_files(None)
    if kind == "files":
        return files.open_files(place, config.text_separator, config.format.fields, field)
    if plugins.is_reference(kind):
        return custom.OwnSource(kind, config)
    assert place is not None
    # These need packages that take a while to import.
    if kind == "tfds":
        module = importlib.import_module("craft_jax.data.sources.tfds")
        return module.TfdsSource(place, config.data_dir, split, f"data.name={place}")
    if kind == "huggingface":
        module = importlib.import_module("craft_jax.data.sources.hugging_face")
        origin = f"data.path={place}"
        return module.HuggingFaceSource(place, split, origin, config.format.fields)
    raise ConfigError(f"data.source={kind} holds images, not text; use a model of images")


def open_sources(config: DataConfig) -> list[tuple[MixtureComponent, dict[str, Source]]]:
    """Opens all sources of a config, each with its named splits.

    Raises:
      DataError, ConfigError: see `open_source`.
    """
    opened = []
    for component in mixture_of(config):
        kind, place, _ = component
        field = "data.mixture" if config.mixture else "data.path"
        sources = {"train": open_source(config, kind, place, config.split, field)}
        for name in ("val", "test"):
            named = getattr(config, f"{name}_split")
            if named and kind in ("tfds", "huggingface"):
                sources[name] = open_source(config, kind, place, named)
            elif named and not any(name in others for _, others in opened):
                field = f"data.{name}_split"
                sources[name] = open_source(config, "files", named, config.split, field)
        opened.append((component, sources))
    return opened


def read_text(config: DataConfig, path: str) -> str:
    """Returns the whole text of a file, a folder or a glob pattern.

    Raises:
      DataError: it is missing or not text.
    """
    parts = open_source(config, "files", path, config.split).parts()
    documents = (document for part in parts for document in part.documents())
    return "".join(s.text for d in documents for s in config.format.spans(d))


def prepare(
    config: DataConfig, workdir: Path, tokenizer: Tokenizer | None = None
) -> list[Prepared]:
    """Tokenizes the text of a config, or opens its caches.

    Args:
      config: names the text.
      workdir: caches are in `{workdir}/data/`.
      tokenizer: replaces the one of the config, to continue a run with its own.

    Raises:
      UsageError: the run has no tokenizer.
      DataError, StorageError: see `builder.build`.
    """
    if config.source == "files" and not config.path and not config.mixture:
        raise UsageError("data.path is empty; set it to a file, a folder or a glob pattern of text")
    if config.tokenizer is None and tokenizer is None:
        raise UsageError(NO_TOKENIZER)
    opened = open_sources(config)
    if tokenizer is None:
        tokenizer = make_tokenizer(config, workdir, [sources["train"] for _, sources in opened])
    else:
        tokenizer = _from_original_file(config, tokenizer)
    prepared = []
    for component, sources in opened:
        build = {"tokenizer": tokenizer, "format": config.format, "folder": workdir / "data"}
        caches = {name: builder.build(source, **build) for name, source in sources.items()}
        prepared.append(Prepared(component, caches))
    return prepared


def _from_original_file(config: DataConfig, tokenizer: Tokenizer) -> Tokenizer:
    """Returns a run's own tokenizer, reopened from its original file if that is unchanged.

    A SentencePiece `.model` encodes more exactly than its `tokenizer.json`: see `Tokenizer`.
    """
    if config.tokenizer and is_tokenizer_path(config.tokenizer):
        with contextlib.suppress(DataError):  # The run has a copy.
            original = Tokenizer.load(config.tokenizer)
            return original if original.digest == tokenizer.digest else tokenizer
    return tokenizer


def make_tokenizer(config: DataConfig, workdir: Path, training: list[Source]) -> Tokenizer:
    """Returns the tokenizer of a config, trained on the training text of its sources if needed.

    Raises:
      DataError: the tokenizer or the text cannot be read.
    """
    assert config.tokenizer is not None
    return vocabulary.train(
        config.tokenizer,
        training,
        config.format,
        fractions=config.fractions,
        hold_out=config.hold_out,
        vocab_size=config.vocab_size,
        special=config.special_tokens,
        max_chars=config.tokenizer_chars,
        folder=workdir / "data" / "tokenizers",
    )


def _check_loss_mask(part: SplitPart, config: DataConfig, split: str) -> None:
    """Checks that some token of a part counts in the loss.

    Raises:
      DataError: none does.
    """
    mask = part.cache.loss_mask
    if mask is None or any(mask.read(*span).any() for span in part.spans.tolist()):
        return
    remedy = f"{config.text_field!r} is empty in each record; set data.text_field"
    if config.messages_field:
        roles = ",".join(config.learned_roles)
        remedy = f"no message has a role in data.learned_roles={roles}; name roles that occur"
    raise DataError(f"all loss weights in the {SPLIT_WORDS[split]} split are 0: {remedy}")


def make_rows(part: SplitPart, config: DataConfig, split: str, seed: int | None) -> Rows:
    """Returns the rows of one split of a source.

    Raises:
      DataError: it is shorter than one row.
    """
    tokens, mask = part.cache.tokens, part.cache.loss_mask
    try:
        _check_loss_mask(part, config, split)
        if config.layout == "concatenated":
            # One padded window is enough to evaluate on, but not to train on.
            least = config.seq_len if split == "train" else 1
            text.check_num_tokens(part.num_tokens, least, config.seq_len, SPLIT_WORDS[split])
            stream = Stream(tokens, part.spans, mask)
            is_random = config.order == "random" and seed is not None
            return (RandomWindows if is_random else Windows)(stream, config.seq_len, seed)
        if not len(part.spans):
            raise DataError(f"the {SPLIT_WORDS[split]} split has no document")
        return DocumentRows(
            tokens,
            mask,
            part.spans,
            seq_len=config.seq_len,
            end_id=part.cache.tokenizer.end_id,
            is_packed=config.layout == "packed",
        )
    except DataError as error:
        raise DataError(f"{part.cache.manifest['source']['origin']}: {error}") from None


# Datasets.


def open_datasets(
    config: DataConfig, *, workdir: Path, seed: int, tokenizer: Tokenizer | None = None
) -> Datasets:
    """Returns the batches of all splits.

    Raises:
      ConfigError: `data.dataset` names a class that cannot be used.
      UsageError, DataError, StorageError: see `prepare`; also a split shorter than one row, and
        pairs or images that cannot be used.
    """
    if config.dataset:
        return _open_own(config, config.dataset, seed)
    if config.pairs:
        return Datasets(*_open_pairs(config, seed, tokenizer))
    if is_of_images(config):
        return _open_images(config, seed)
    return open_text(config, prepare(config, workdir, tokenizer), seed)


def _open_own(config: DataConfig, reference: str, seed: int) -> Datasets:
    try:
        return Datasets(
            *(examples.build(Recipe(reference, config, s, seed)) for s in ("train", "val"))
        )
    except CraftError:
        raise
    except Exception as error:
        raise DataError(
            f"data.dataset={reference}: its __init__ failed with {type(error).__name__}: "
            f"{one_line(error)}; correct it"
        ) from error


def _open_pairs(config: DataConfig, seed: int, tokenizer: Tokenizer | None) -> tuple:
    assert config.pairs is not None
    given = tokenizer or config.tokenizer
    if given is None:
        raise UsageError(NO_TOKENIZER)
    return pairs.open_pairs(
        config.pairs,
        num_pairs=config.num_pairs,
        val_fraction=config.val_fraction,
        tokenizer=given,
        vocab_size=config.vocab_size,
        seq_len=config.seq_len,
        batch_size=config.batch_size,
        seed=seed,
    )


def open_text(config: DataConfig, prepared: list[Prepared], seed: int) -> Datasets:
    """Returns the batches of prepared sources.

    Raises:
      DataError: a split is shorter than one row.
    """
    divided = partition(prepared, config)
    tokenizer = prepared[0].caches["train"].tokenizer
    info = DatasetInfo(
        tokenizer=tokenizer,
        vocab_size=tokenizer.vocab_size,
        fingerprint=fingerprint(config, prepared),
        name="_".join(p.caches["train"].manifest["source"]["name"] for p in prepared)[:_MAX_NAME],
    )

    def rows(split: str, seeds: Callable[[int], int | None]) -> list[Rows]:
        return [
            make_rows(parts[split], config, split, seeds(n))
            for n, parts in enumerate(divided)
            if split in parts
        ]

    def options(split: str) -> dict[str, Any]:
        num_bytes = sum(parts[split].num_bytes for parts in divided if split in parts)
        sizes = {"seq_len": config.seq_len, "batch_size": config.batch_size}
        return sizes | {"info": dataclasses.replace(info, num_bytes=num_bytes)}

    weights = [source.component.weight for source in prepared]
    training = rows("train", lambda n: int(mix(seed, n)) >> 33)
    train = text.TextBatches(training, weights, seed=seed, **options("train"))
    held_out = {
        split: text.ValidationRows(found, **options(split))
        for split in ("val", "test")
        if (found := rows(split, lambda n: None))
    }
    return Datasets(train, **held_out)


def fingerprint(config: DataConfig, prepared: list[Prepared]) -> str:
    """Returns a SHA-256 of everything that decides the content of the batches."""
    digests = [{name: tokens.digest for name, tokens in p.caches.items()} for p in prepared]
    # In this wording, which is part of the fingerprints of existing runs.
    weights = [
        "Share(steps={}, weights={})".format(*map(repr, p.component.weight)) for p in prepared
    ]
    facts = [digests, weights, config.fractions, config.hold_out, config.layout, config.order]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


# Images.


def is_of_images(config: DataConfig) -> bool:
    """Returns whether a config names images.

    Raises:
      DataError: it names a TFDS dataset that is missing.
    """
    if config.source != "tfds" or config.mixture:
        return config.source in ("digits", "images") and not config.mixture
    assert config.name is not None
    module = importlib.import_module("craft_jax.data.sources.tfds")
    kinds = module.feature_kinds(module.open_builder(config.name, config.data_dir))
    return "image" in kinds.values() and kinds.get(config.text_field) != "text"


def _open_images(config: DataConfig, seed: int) -> Datasets:
    images = importlib.import_module("craft_jax.data.images.datasets")
    pixels = importlib.import_module("craft_jax.data.images.pixels")
    processor = pixels.ImageProcessor(
        size=config.image_size,
        channels=config.image_channels,
        crop=config.image_crop,
        flip=config.image_flip,
    )
    val_fraction, test_fraction = config.fractions
    source = _image_source(config, config.split)
    named = {
        name: _image_source(config, split, source.label_names, f"data.{name}_split")
        for name in ("val", "test")
        if (split := getattr(config, f"{name}_split"))
    }
    return Datasets(
        **images.open_images(
            source,
            named,
            val_fraction=val_fraction,
            test_fraction=test_fraction,
            batch_size=config.batch_size,
            seed=seed,
            processor=processor,
            num_colors=config.image_colors,
        )
    )


def _image_source(
    config: DataConfig,
    split: str,
    classes: tuple[str, ...] | None = None,
    field: str = "data.path",
) -> Any:
    if config.source == "tfds":
        module = importlib.import_module("craft_jax.data.images.tfds")
        return module.from_tfds(config.name, config.data_dir, split)
    module = importlib.import_module("craft_jax.data.images.sources")
    if config.source == "digits":
        return module.digits()
    # The splits of `images` are folders.
    return module.folder(config.path if classes is None else split, field, classes)


# Paths of a config.


def is_tokenizer_path(tokenizer: str) -> bool:
    """Returns whether `data.tokenizer` is a path rather than a kind."""
    return tokenizer not in KINDS


def is_pairs_path(name: str) -> bool:
    """Returns whether `data.pairs` is a path rather than a task."""
    return name not in pair_sources.TASKS


def with_paths(config: DataConfig, absolute: Callable[[str], str]) -> DataConfig:
    """Returns a config with absolute paths, so that a run can resume from another folder."""
    changes: dict[str, Any] = {
        field: absolute(value)
        for field in ("path", "data_dir")
        if (value := getattr(config, field))
    }
    if config.tokenizer and is_tokenizer_path(config.tokenizer):
        changes["tokenizer"] = absolute(config.tokenizer)
    if config.pairs and is_pairs_path(config.pairs):
        changes["pairs"] = absolute(config.pairs)
    if config.source not in ("tfds", "huggingface"):
        for field in ("val_split", "test_split"):
            if value := getattr(config, field):
                changes[field] = absolute(value)
    mixture = []
    for entry in config.mixture:
        place, _, weight = entry.rpartition("=")
        if not place:  # Invalid; the check of the config reports it.
            mixture.append(entry)
            continue
        kind, colon, name = place.partition(":")
        if colon and kind == "huggingface":
            place = f"huggingface:{absolute(name)}"
        elif place != "stdlib" and not (colon and kind == "tfds"):
            place = absolute(place)
        mixture.append(f"{place}={weight}")
    return dataclasses.replace(config, mixture=tuple(mixture), **changes)
