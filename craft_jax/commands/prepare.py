"""prepare: tokenizes the text of a config ahead of training."""

import argparse
import json
from pathlib import Path

from craft_jax import config as configs
from craft_jax import runs, runtime
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
    cache = pipeline.prepare(config.data, workdir)
    print(json.dumps(cache.manifest, indent=2, ensure_ascii=False))
    print(cache.path)
    return OK
