"""prepare: tokenizes the text of a config ahead of training, or reads its pairs to check them."""

import argparse
import importlib
import json
from pathlib import Path

from craft_jax.commands import data_config
from craft_jax.config import ExperimentConfig
from craft_jax.data import pipeline
from craft_jax.data.settings import mixture_of
from craft_jax.errors import OK, UsageError


def run(args: argparse.Namespace) -> int:
    """Makes the token caches of a config, or of a run's, and prints their manifests."""
    config, tokenizer, workdir = data_config.choose(args)
    data = config.data
    if data.dataset:
        raise UsageError(f"data.dataset={data.dataset} prepares its own data")
    if data.pairs:
        print(_pairs_in_words(config, workdir))
        return OK
    for kind, place, _ in mixture_of(data):
        if kind == "tfds":  # It takes a while to import.
            tfds_source = importlib.import_module("craft_jax.data.sources.tfds")
            tfds_source.download(place, data.data_dir)
    if pipeline.is_of_images(data):
        found = pipeline.open_datasets(data, workdir=workdir, seed=config.training.seed)
        print(f"images need no preparation; an epoch is {len(found.train):,} batches")
        return OK
    for prepared in pipeline.prepare(data, workdir, tokenizer):
        for tokens in prepared.caches.values():
            print(json.dumps(tokens.manifest, indent=2, ensure_ascii=False))
            print(tokens.path)
    return OK


def _pairs_in_words(config: ExperimentConfig, workdir: Path) -> str:
    data = pipeline.open_datasets(config.data, workdir=workdir, seed=config.training.seed)
    counts = [
        f"{len(split.pairs):,} {verb}"
        for split, verb in ((data.train, "train"), (data.val, "validate"))
        if split is not None
    ]
    return (
        f"data.pairs={config.data.pairs}: pairs need no preparation; {', '.join(counts)}, "
        f"{data.train.vocab_size} tokens in the vocabulary"
    )
