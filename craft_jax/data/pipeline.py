"""From the `data` section of a config to datasets: the one page that joins the rooms of `data/`.

    source -> tokenizer -> token cache -> splits -> rows -> batches by number

`prepare` goes as far as the caches; `open_datasets` gives the batches of all splits, of text, of
pairs of text, of images, or of a dataset class of the user's own.
"""

import contextlib
import dataclasses
import hashlib
import importlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from craft_jax import plugins
from craft_jax.data import examples, pairs, splits, text
from craft_jax.data.base import Dataset, Recipe
from craft_jax.data.cache import builder
from craft_jax.data.cache.token_cache import TokenCache
from craft_jax.data.sampling import mix
from craft_jax.data.settings import DataConfig, Ingredient, mixture_of
from craft_jax.data.sources import custom, files
from craft_jax.data.sources.documents import Source, one_line
from craft_jax.data.splits import Fractions
from craft_jax.data.text import Rows, Stream
from craft_jax.data.tokenizers import KINDS, Tokenizer, vocabulary
from craft_jax.errors import ConfigError, CraftError, DataError, UsageError

logger = logging.getLogger(__name__)

NO_TOKENIZER = "the model came without a tokenizer: name one with --tokenizer=PATH"
_MAX_NAME = 60
_BLOCK = 1 << 22
_SPLIT_WORDS = {"train": "training", "val": "validation", "test": "test"}


class Datasets(NamedTuple):
    """The splits; `val` and `test` are None where nothing is held out."""

    train: Dataset
    val: Dataset | None = None
    test: Dataset | None = None


class Prepared(NamedTuple):
    """One source of a config, tokenized.

    Attributes:
      ingredient: what it is, and its share of the mixture.
      caches: by split, where the source or the config names splits; else `train` alone, which the
        others are a part of.
    """

    ingredient: Ingredient
    caches: Mapping[str, TokenCache]


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
      DataError: it is not there, or cannot be read.
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


def open_sources(config: DataConfig) -> list[tuple[Ingredient, dict[str, Source]]]:
    """Opens all sources of a config, each with the splits that are named.

    Raises:
      DataError, ConfigError: see `open_source`.
    """
    opened = []
    for ingredient in mixture_of(config):
        kind, place, _ = ingredient
        field = "data.mixture" if config.mixture else "data.path"
        found = {"train": open_source(config, kind, place, config.split, field)}
        for name in ("val", "test"):
            named = getattr(config, f"{name}_split")
            if named and kind in ("tfds", "huggingface"):
                found[name] = open_source(config, kind, place, named)
            elif named and not any(name in others for _, others in opened):
                field = f"data.{name}_split"
                found[name] = open_source(config, "files", named, config.split, field)
        opened.append((ingredient, found))
    return opened


def read_text(config: DataConfig, path: str) -> str:
    """Returns the text of a file, a folder or a glob pattern, whole.

    Raises:
      DataError: it is missing or not text.
    """
    parts = open_source(config, "files", path, config.split).parts()
    documents = (document for part in parts for document in part.documents())
    return "".join(s.text for d in documents for s in config.format.stretches(d))


def prepare(
    config: DataConfig, workdir: Path, tokenizer: Tokenizer | None = None
) -> list[Prepared]:
    """Tokenizes the text of a config, or finds it tokenized already.

    Args:
      config: what to read.
      workdir: the caches go into `{workdir}/data/`.
      tokenizer: takes the place of the config's, to continue a run with its own.

    Raises:
      UsageError: the run has no tokenizer.
      DataError, StorageError: see `builder.build`.
    """
    if config.source == "files" and not config.path and not config.mixture:
        raise UsageError("data.path is empty: name your text with --config.data.path=PATH")
    if config.tokenizer is None and tokenizer is None:
        raise UsageError(NO_TOKENIZER)
    opened = open_sources(config)
    if tokenizer is None:
        tokenizer = make_tokenizer(config, workdir, [found["train"] for _, found in opened])
    else:
        tokenizer = _as_its_file(config, tokenizer)
    prepared = []
    for ingredient, found in opened:
        build = {"tokenizer": tokenizer, "format": config.format, "folder": workdir / "data"}
        caches = {name: builder.build(source, **build) for name, source in found.items()}
        prepared.append(Prepared(ingredient, caches))
    return prepared


def _as_its_file(config: DataConfig, tokenizer: Tokenizer) -> Tokenizer:
    """Returns a run's own tokenizer as its file gives it, where that is still the same.

    A SentencePiece model knows more than a `tokenizer.json` has of it: see `Tokenizer`.
    """
    if config.tokenizer and is_tokenizer_path(config.tokenizer):
        with contextlib.suppress(DataError):  # The run has a copy.
            found = Tokenizer.load(config.tokenizer)
            return found if found.digest == tokenizer.digest else tokenizer
    return tokenizer


def make_tokenizer(config: DataConfig, workdir: Path, training: list[Source]) -> Tokenizer:
    """Returns the tokenizer of a config, made from the training text of its sources if need be.

    Raises:
      DataError: it cannot be read, or the text cannot.
    """
    assert config.tokenizer is not None
    return vocabulary.make(
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


# Splits.


class Part(NamedTuple):
    """What one split has of a cache.

    Attributes:
      cache: where it lies.
      stretches: first token and end of each document, or piece of one, int64 (M, 2).
      keys: of each document, uint64 (M,).
      num_bytes: UTF-8 bytes of its text, or, where not all is learned, of what is.
    """

    cache: TokenCache
    stretches: np.ndarray
    keys: np.ndarray
    num_bytes: int

    @property
    def num_tokens(self) -> int:
        return int((self.stretches[:, 1] - self.stretches[:, 0]).sum())


def divide(prepared: list[Prepared], config: DataConfig) -> list[dict[str, Part]]:
    """Returns what each split has of each source; splits without any are left out.

    What validates or tests is taken out of what trains, also where it comes from another source, or
    from a split that has a name; and what tests out of what validates.
    """
    divided = [_divided(source, config) for source in prepared]
    for name, others in (("val", ("test",)), ("train", ("val", "test"))):
        if not _can_overlap(prepared, config):
            break
        held = [[parts[o].keys for o in others if o in parts] for parts in divided]
        every = np.concatenate([np.zeros(0, np.uint64), *(k for keys in held for k in keys)])
        for parts, own in zip(divided, held, strict=True):
            if name in parts:
                parts[name] = _without(parts[name], every, own, name)
    for parts in divided:
        for name in ("val", "test"):
            if name in parts and config.max_val_tokens:
                parts[name] = _first(parts[name], config.max_val_tokens)
    return divided


def _can_overlap(prepared: list[Prepared], config: DataConfig) -> bool:
    """Whether a document can be in two splits: not where all are chosen by their keys."""
    by_key = (
        len(prepared) == 1
        and len(prepared[0].caches) == 1
        and config.hold_out != "tail"
        and len(prepared[0].caches["train"].documents) >= splits.FEWEST
    )
    return not by_key


def _divided(prepared: Prepared, config: DataConfig) -> dict[str, Part]:
    found = _by_fraction(prepared.caches["train"], config.fractions, config.hold_out)
    for name in ("val", "test"):
        if name in prepared.caches:
            found[name] = _by_fraction(prepared.caches[name], Fractions(), "documents")["train"]
    return found


def _by_fraction(tokens: TokenCache, fractions: Fractions, hold_out: str) -> dict[str, Part]:
    documents = tokens.documents
    keys = np.asarray(documents["key"])
    bounds = np.append(documents["start"], len(tokens.tokens)).astype(np.int64)
    stretches = np.stack([bounds[:-1], bounds[1:]], axis=1)
    is_tail = hold_out == "tail" or (hold_out == "auto" and len(documents) < splits.FEWEST)
    if is_tail and any(fractions):
        places = splits.by_place(len(tokens.tokens), fractions)
        names = ("train", *splits.held_out(fractions))
        return {name: _range(tokens, stretches, keys, *places[name]) for name in names}
    found = {}
    for name, chosen in splits.by_key(keys, fractions).items():
        numbers = chosen
        if name != "train":  # In the order of their keys, so that the first are a fair sample.
            numbers = chosen[np.argsort(keys[chosen], kind="stable")]
        if len(numbers) or name == "train":
            here = stretches[numbers]
            is_plain = tokens.mask is None
            size = documents["bytes"][numbers].sum() if is_plain else _text_bytes(tokens, here)
            found[name] = Part(tokens, here, keys[numbers], int(size))
    return found


def _without(part: Part, every: np.ndarray, own: list[np.ndarray], split: str) -> Part:
    """Returns a part without the documents that are held out, but for those that it was cut from.

    Args:
      part: of one source.
      every: keys of the documents of all sources that are held out.
      own: those of the same source.
      split: its name, for the message.
    """
    is_held = np.isin(part.keys, every)
    if not is_held.any():
        return part
    # Where the end of the text is held out, a document can be on both sides of the cut.
    edges = part.stretches[:, 1]
    bounds = np.append(part.cache.documents["start"], len(part.cache.tokens))
    is_cut = ~np.isin(edges, bounds) & np.isin(part.keys, np.concatenate([part.keys[:0], *own]))
    is_held &= ~is_cut
    if not is_held.any():
        return part
    logger.warning(
        "%s: %d of %d documents of the %s split are also held out; they are left out of it",
        part.cache.manifest["source"]["origin"],
        np.count_nonzero(is_held),
        len(is_held),
        _SPLIT_WORDS[split],
    )
    size = part.num_bytes - _text_bytes(part.cache, part.stretches[is_held])
    return Part(part.cache, part.stretches[~is_held], part.keys[~is_held], size)


def _range(
    tokens: TokenCache, stretches: np.ndarray, keys: np.ndarray, start: int, stop: int
) -> Part:
    """Returns the documents, or pieces of them, between two tokens."""
    is_inside = (stretches[:, 1] > start) & (stretches[:, 0] < stop)
    cut = np.clip(stretches[is_inside], start, stop)
    return Part(tokens, cut, keys[is_inside], _text_bytes(tokens, cut))


def _text_bytes(tokens: TokenCache, stretches: np.ndarray) -> int:
    """Returns how many bytes of UTF-8 the learned text of some tokens is."""
    total = 0
    for first, last in stretches.tolist():
        for start in range(first, last, _BLOCK):
            stop = min(start + _BLOCK, last)
            ids = tokens.tokens.read(start, stop)
            if tokens.mask is not None:
                ids = ids[tokens.mask.read(start, stop) > 0]
            total += tokens.tokenizer.num_bytes(ids)
    return total


def _first(part: Part, max_tokens: int) -> Part:
    """Returns the first documents of a part, the last of them cut if need be."""
    if part.num_tokens <= max_tokens:
        return part
    ends = np.cumsum(part.stretches[:, 1] - part.stretches[:, 0])
    count = int(np.searchsorted(ends, max_tokens)) + 1
    stretches = part.stretches[:count].copy()
    stretches[-1, 1] -= int(ends[count - 1]) - max_tokens
    return Part(part.cache, stretches, part.keys[:count], _text_bytes(part.cache, stretches))


def _check_learned(part: Part, config: DataConfig, split: str) -> None:
    """Checks that something in a part is learned.

    Raises:
      DataError: nothing is.
    """
    mask = part.cache.mask
    if mask is None or any(mask.read(*stretch).any() for stretch in part.stretches.tolist()):
        return
    remedy = f"{config.text_field!r} is empty in each record; set data.text_field"
    if config.messages_field:
        roles = ",".join(config.learned_roles)
        remedy = f"no message is of data.learned_roles={roles}; name roles that there are"
    raise DataError(f"nothing in the {_SPLIT_WORDS[split]} split is learned: {remedy}")


def make_rows(part: Part, config: DataConfig, split: str, seed: int | None) -> Rows:
    """Returns the rows of one split of a source.

    Raises:
      DataError: it is shorter than one row.
    """
    tokens, mask, tokenizer = part.cache.tokens, part.cache.mask, part.cache.tokenizer
    try:
        _check_learned(part, config, split)
        if config.layout == "concatenated":
            # One window that is padded is enough to evaluate on, but hardly meant to be learned.
            least = config.seq_len if split == "train" else 1
            text.need_tokens(part.num_tokens, least, config.seq_len, _SPLIT_WORDS[split])
            stream = Stream(tokens, part.stretches, mask)
            is_random = config.order == "random" and seed is not None
            kind = text.RandomWindows if is_random else text.Windows
            return kind(stream, config.seq_len, seed)
        if not len(part.stretches):
            raise DataError(f"the {_SPLIT_WORDS[split]} split has no document")
        return text.DocumentRows(
            tokens,
            mask,
            part.stretches,
            seq_len=config.seq_len,
            end_id=tokenizer.end_id,
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
            f"data.dataset={reference}: building it failed with {type(error).__name__}: "
            f"{one_line(error)}; mend its __init__"
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
    divided = divide(prepared, config)
    sizes = {"seq_len": config.seq_len, "batch_size": config.batch_size}
    tokenizer = prepared[0].caches["train"].tokenizer
    name = "_".join(p.caches["train"].manifest["source"]["name"] for p in prepared)
    facts = {
        "tokenizer": tokenizer,
        "name": name[:_MAX_NAME],
        "fingerprint": fingerprint(config, prepared),
    }

    def rows(split: str, seeds: Callable[[int], int | None]) -> list[Rows]:
        return [
            make_rows(parts[split], config, split, seeds(n))
            for n, parts in enumerate(divided)
            if split in parts
        ]

    shares = [source.ingredient.share for source in prepared]
    training = rows("train", lambda n: int(mix(seed, n)) >> 33)
    train = text.TextBatches(training, shares, seed=seed, **sizes)
    num_bytes = sum(parts["train"].num_bytes for parts in divided)
    found = {"train": text.described(train, num_bytes=num_bytes, **facts)}
    for split in ("val", "test"):
        if held_out := rows(split, lambda n: None):
            num_bytes = sum(parts[split].num_bytes for parts in divided if split in parts)
            made = text.ValidationRows(held_out, **sizes)
            found[split] = text.described(made, num_bytes=num_bytes, **facts)
    return Datasets(**found)


def fingerprint(config: DataConfig, prepared: list[Prepared]) -> str:
    """Returns what identifies the content that a config's batches are made of."""
    digests = [{name: tokens.digest for name, tokens in p.caches.items()} for p in prepared]
    shares = [str(p.ingredient.share) for p in prepared]
    facts = [digests, shares, config.fractions, config.hold_out, config.layout, config.order]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


# Images.


def is_of_images(config: DataConfig) -> bool:
    """Whether a config names images.

    Raises:
      DataError: it names a TFDS dataset that is not there.
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
    # A split of a folder is a folder of its own.
    return module.folder(config.path if classes is None else split, field, classes)


# Words of a config.


def is_tokenizer_path(tokenizer: str) -> bool:
    """Whether `data.tokenizer` names a file rather than a kind."""
    return tokenizer not in KINDS


def is_pairs_path(name: str) -> bool:
    """Whether `data.pairs` names a file rather than a task."""
    return name not in pairs.TASKS


def with_paths(config: DataConfig, absolute: Callable[[str], str]) -> DataConfig:
    """Returns a config whose paths are absolute, so that a run goes on from another folder."""
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
        if not place:  # Not one: the check of the config says so.
            mixture.append(entry)
            continue
        kind, colon, name = place.partition(":")
        if colon and kind == "huggingface":
            place = f"huggingface:{absolute(name)}"
        elif place != "stdlib" and not (colon and kind == "tfds"):
            place = absolute(place)
        mixture.append(f"{place}={weight}")
    return dataclasses.replace(config, mixture=tuple(mixture), **changes)
