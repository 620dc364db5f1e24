"""evaluate: loss, perplexity, accuracy and more of a run, on a split, a text, or pairs."""

import argparse
import json
import logging
from pathlib import Path

import jax

from craft_jax import outputs, runs
from craft_jax.commands import report
from craft_jax.data import pair_sources, pairs, pipeline, text
from craft_jax.data.base import Dataset
from craft_jax.errors import OK, DataError, UsageError
from craft_jax.parallel import sharding
from craft_jax.parallel.sharding import ParallelConfig
from craft_jax.runs import Run
from craft_jax.runtime import compilation_cache
from craft_jax.runtime.logging import log_to, setup_logging
from craft_jax.training import tasks
from craft_jax.training.evaluation import Evaluator
from craft_jax.training.precision import Policy

logger = logging.getLogger(__name__)


def run(args: argparse.Namespace) -> int:
    """Evaluates the newest checkpoint of a run, or the one that `--run` names."""
    workdir = Path(args.workdir).expanduser().absolute()
    opened = runs.open(
        args.run or "latest",
        workdir=workdir,
        overrides=args.overrides,
        tokenizer=args.tokenizer,
        last=args.weights == "last",
        checkpoint=args.checkpoint,
    )
    setup_logging()
    compilation_cache.enable_compilation_cache()
    split = Path(args.text).name if args.text else args.split
    data = _data(opened, args, workdir)
    mesh = sharding.make_mesh(ParallelConfig(), jax.devices()[:1])
    evaluator = Evaluator(opened.model_def, Policy.named(opened.config.training.precision), mesh)
    sums = evaluator(opened.params, data)
    metrics = tasks.task_of(opened.config.model_class).metrics(sums, data)
    result = {"split": split, **metrics, "step": opened.step, "run": opened.paths.name}

    word = report.model_word(opened.config)
    file = outputs.evaluation_file(workdir, word, data.name)
    outputs.write_json(file, result)
    with log_to(outputs.eval_log(workdir, word)):
        for name, value in result.items():
            shown = f"{value:.6f}" if isinstance(value, float) else value
            logger.info("%-14s %s", name, shown)
        logger.info("%-14s %s", "written to", file)
    print(json.dumps(result), flush=True)
    return OK


def _data(opened: Run, args: argparse.Namespace, workdir: Path) -> Dataset:
    data = opened.config.data
    if args.text and opened.image_format is not None:
        raise UsageError(f"`text`: run {opened.paths.name} is one of images; give a `split`")
    if args.text and opened.config.reads_pairs:
        return _file_of_pairs(opened, args.text)
    if args.text:
        return text.from_text(
            pipeline.read_text(data, args.text),
            opened.need_tokenizer(),
            seq_len=data.seq_len,
            batch_size=data.batch_size,
            name="".join(c if c.isalnum() else "_" for c in Path(args.text).stem),
        )
    opened.config.check_pairs()
    datasets = pipeline.open_datasets(
        data, workdir=workdir, seed=opened.config.training.seed, tokenizer=opened.tokenizer
    )
    known = opened.meta["data_fingerprint"]
    if known is not None and datasets.train.fingerprint != known:
        logger.warning(
            "the data is not what this run was trained on: its text or split has changed"
        )
    if args.split == "train":
        return datasets.train.one_pass()
    held_out = getattr(datasets, args.split)
    if held_out is None:
        field = f"data.{args.split}_fraction"
        words = {"val": "validation", "test": "test"}[args.split]
        raise DataError(f"{field}=0: the run has no {words} split; use `split=train`")
    return held_out


def _file_of_pairs(opened: Run, path: str) -> Dataset:
    if not pair_sources.has_pairs_name(path):
        raise UsageError(
            f"`text={path}`: run {opened.paths.name} reads pairs; name a .tsv or .jsonl file"
        )
    data = opened.config.data
    return pairs.from_file(
        Path(path),
        opened.need_tokenizer(),
        field="--text",
        seq_len=data.seq_len,
        batch_size=data.batch_size,
    )
