"""The config of `prepare`, `tokenizer`, `data` and `benchmark`, from a file or from a run."""

import argparse
from pathlib import Path

from craft_jax import config as configs
from craft_jax import runs
from craft_jax.config import ExperimentConfig
from craft_jax.data.tokenizers import Tokenizer
from craft_jax.errors import UsageError
from craft_jax.runtime.logging import setup_logging


def choose(args: argparse.Namespace) -> tuple[ExperimentConfig, Tokenizer | None, Path]:
    """Returns the config that `--config` or `--run` names, the run's tokenizer, and the workdir.

    Raises:
      UsageError: neither is given.
      ConfigError: the config cannot be used.
    """
    workdir = Path(args.workdir).expanduser().absolute()
    if args.config:
        found = configs.load(args.config, args.overrides), None
    elif args.run:
        run = runs.open(args.run, workdir=workdir, overrides=args.overrides)
        found = run.config, run.tokenizer
    else:
        raise UsageError(
            f"{args.command} needs a config: `config=configs/gpt.py`, or that of a `run`"
        )
    setup_logging()
    return *found, workdir
