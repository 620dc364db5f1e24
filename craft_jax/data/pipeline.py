"""From the `data` section of a config to datasets: the one page that joins the rooms of `data/`.

`prepare` turns a source into a token cache; `open_datasets` gives the training and validation
batches, from that cache, from pairs of text, or from a dataset class of the user's own.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from craft_jax import plugins
from craft_jax.data import cache, pairs, sources, text
from craft_jax.data.base import Dataset, Recipe
from craft_jax.data.cache import TokenCache
from craft_jax.data.tokenizers import KINDS, Tokenizer
from craft_jax.errors import ConfigError, UsageError
from craft_jax.schema import MAX_POSITIONS, MAX_VOCAB, Contradiction, setting

NO_TOKENIZER = "the model came without a tokenizer: name one with --tokenizer=PATH"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What to train on, and how it is cut into batches."""

    source: Literal["auto", "stdlib", "files"] = setting(
        "auto", "where text comes from; auto is files when data.path is set, else stdlib"
    )
    path: str | None = setting(None, "a file, a folder or a glob pattern of text")
    text_field: str = setting("text", "the field that holds the text in .jsonl lines")
    tokenizer: str | None = setting(
        "bpe", "char, byte, bpe, or the path of a tokenizer.json; none for a model without one"
    )
    vocab_size: int = setting(
        1024,
        "tokens in the vocabulary that bpe trains; others ignore it",
        minimum=257,
        maximum=MAX_VOCAB,
    )
    val_fraction: float = setting(
        0.1,
        "the part of the text, or of a file's pairs, at its end, that validates",
        minimum=0,
        below=1,
    )
    max_val_chars: int | None = setting(
        None, "the most characters that validate; none for no limit", minimum=1
    )
    pairs: str | None = setting(
        None,
        "pairs of text instead of running text: dates, reverse or sort (made here), or the path of "
        "a .tsv or .jsonl file (fields source, target)",
    )
    num_pairs: int = setting(20000, "made pairs that train", minimum=1, maximum=10**7)
    seq_len: int = setting(
        128,
        "tokens in a training window; of pairs, the most in a source and in a target, end token "
        "included",
        minimum=1,
        maximum=MAX_POSITIONS,
    )
    batch_size: int = setting(
        16, "windows or pairs per optimizer step, over all devices", minimum=1, maximum=2**24
    )
    dataset: str | None = setting(
        None, "a dataset class of your own, path/file.py:Class; replaces the text pipeline"
    )
    workers: int = setting(0, "processes that make batches; 0 for a thread", minimum=0, maximum=64)
    prefetch: int = setting(
        2,
        "batches made ahead, and as many by each of the workers; 0 makes each when it is asked for",
        minimum=0,
        maximum=1000,
    )
    allow_change: bool = setting(
        False, "continue a run on data that has changed; its batches are counted from 0 again"
    )

    def contradictions(self) -> Iterator[Contradiction]:
        if self.source == "files" and not self.path:
            yield Contradiction(
                ("data.source", "data.path"), "data.source=files needs data.path; name your text"
            )
        if self.source == "stdlib" and self.path:
            yield Contradiction(
                ("data.source", "data.path"),
                f"data.source=stdlib contradicts data.path={self.path}; leave one of them out",
            )
        other = "path" if self.path else "dataset" if self.dataset else None
        if self.pairs and other:
            yield Contradiction(
                ("data.pairs", f"data.{other}"),
                f"data.pairs={self.pairs} contradicts data.{other}={getattr(self, other)}; leave "
                "one of them out",
            )


class Datasets(NamedTuple):
    """The two splits; `val` is None where nothing is held out."""

    train: Dataset
    val: Dataset | None


def prepare(config: DataConfig, workdir: Path, tokenizer: Tokenizer | None = None) -> TokenCache:
    """Tokenizes the text of a config, or finds it tokenized already.

    Args:
      config: what to read.
      workdir: the cache goes into `{workdir}/data/`.
      tokenizer: takes the place of the config's, to continue a run with its own.

    Raises:
      UsageError: the run has no tokenizer, or no text.
      DataError, StorageError: see `cache.build`.
    """
    if config.source == "files" and not config.path:
        raise UsageError("data.path is empty: name your text with --config.data.path=PATH")
    if config.tokenizer is None and tokenizer is None:
        raise UsageError(NO_TOKENIZER)
    source = sources.open_source(config.source, config.path, config.text_field)
    build = {
        "vocab_size": config.vocab_size,
        "val_fraction": config.val_fraction,
        "max_val_chars": config.max_val_chars,
    }
    if tokenizer is not None and (not config.tokenizer or is_tokenizer_path(config.tokenizer)):
        return cache.build(source, tokenizer=tokenizer, folder=workdir / "data", **build)
    found = cache.build(source, tokenizer=config.tokenizer, folder=workdir / "data", **build)
    if tokenizer is None or found.tokenizer.digest == tokenizer.digest:
        return found
    return cache.build(source, tokenizer=tokenizer, folder=workdir / "data", **build)


def open_datasets(
    config: DataConfig, *, workdir: Path, seed: int, tokenizer: Tokenizer | None = None
) -> Datasets:
    """Returns the batches of both splits.

    Raises:
      ConfigError: `data.dataset` names a class that cannot be used.
      UsageError, DataError, StorageError: see `prepare`; also a split shorter than one window, and
        pairs that cannot be used.
    """
    if config.dataset:
        cls = plugins.load(config.dataset, "data.dataset", Dataset)
        try:
            splits = [cls(config, split, seed) for split in ("train", "val")]
        except TypeError as error:
            raise ConfigError(
                f"data.dataset={config.dataset} is built as Class(config, split, seed): {error}"
            ) from error
        for dataset, split in zip(splits, ("train", "val"), strict=True):
            dataset.recipe = Recipe(config.dataset, config, split, seed)
        return Datasets(*splits)
    if config.pairs:
        given = tokenizer or config.tokenizer
        if given is None:
            raise UsageError(NO_TOKENIZER)
        splits = pairs.open_pairs(
            config.pairs,
            num_pairs=config.num_pairs,
            val_fraction=config.val_fraction,
            tokenizer=given,
            vocab_size=config.vocab_size,
            seq_len=config.seq_len,
            batch_size=config.batch_size,
            seed=seed,
        )
        return Datasets(*splits)
    tokens = prepare(config, workdir, tokenizer)
    options = {"seq_len": config.seq_len, "batch_size": config.batch_size, "seed": seed}
    train = text.from_cache(tokens, "train", **options)
    if config.val_fraction == 0:
        return Datasets(train, None)
    return Datasets(train, text.from_cache(tokens, "val", **options))


def is_tokenizer_path(tokenizer: str) -> bool:
    """Whether `data.tokenizer` names a file rather than a kind."""
    return tokenizer not in KINDS


def is_pairs_path(name: str) -> bool:
    """Whether `data.pairs` names a file rather than a task."""
    return name not in pairs.TASKS
