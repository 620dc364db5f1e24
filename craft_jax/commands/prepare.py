"""prepare: tokenizes the text of a config ahead of training, or reads its pairs to check them."""

import argparse
import json
from pathlib import Path

from craft_jax import config as configs
from craft_jax import runs, runtime
from craft_jax.config import ExperimentConfig
from craft_jax.data import pipeline
from craft_jax.errors import OK, UsageError


def run(args: argparse.Namespace) -> int:
    """Makes the token cache of a config, or of a run's, and prints its manifest."""
    workdir = Path(args.workdir).expanduser().absolute()
    if args.config:
        config = configs.load(args.config, args.overrides)
    elif args.run:
        config = runs.open(args.run, workdir=workdir, overrides=args.overrides).config
    else:
        raise UsageError("prepare needs to know the text: --config=configs/gpt.py, or --run")
    if config.data.dataset:
        raise UsageError(f"data.dataset={config.data.dataset} prepares its own data")
    runtime.setup_logging()
    if config.data.pairs:
        print(_pairs_in_words(config, workdir))
        return OK
    cache = pipeline.prepare(config.data, workdir)
    print(json.dumps(cache.manifest, indent=2, ensure_ascii=False))
    print(cache.path)
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
