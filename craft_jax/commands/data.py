"""data: what a model will see: sources, splits, rows, and real batches in words or as a picture."""

import argparse
import importlib
import itertools
from pathlib import Path

import numpy as np

from craft_jax import outputs
from craft_jax.commands import data_config
from craft_jax.config import ExperimentConfig
from craft_jax.data import loading, partition, pipeline
from craft_jax.data.base import Batch, Dataset
from craft_jax.data.images.conversion import shown
from craft_jax.data.partition import Prepared
from craft_jax.data.pipeline import Datasets
from craft_jax.data.text import TextBatches
from craft_jax.data.tokenizers import Tokenizer
from craft_jax.errors import OK, DataError, UsageError

_GRID_COLUMNS = 8
_MAX_IMAGES = 64


def run(args: argparse.Namespace) -> int:
    """Prints the pipeline of a config and some rows of one of its batches."""
    config, tokenizer, workdir = data_config.choose(args)
    data, seed = config.data, config.training.seed
    if args.step < 0 or args.rows < 0:
        raise UsageError(f"`step={args.step}` and `rows={args.rows}` count from 0")
    if not (data.dataset or data.pairs or pipeline.is_of_images(data)):
        prepared = pipeline.prepare(data, workdir, tokenizer)
        found = pipeline.open_text(data, prepared, seed)
        _describe_text(config, prepared, found)
    else:
        found = pipeline.open_datasets(data, workdir=workdir, seed=seed, tokenizer=tokenizer)
        _describe(config, found)
    split = getattr(found, args.split)
    if split is None:
        raise DataError(f"`split={args.split}`: nothing is held out for it; the config has none")
    if args.split != "train" and args.step >= len(split):
        raise UsageError(f"`step={args.step}`: the {args.split} split has {len(split)} batches")
    batch = loading.read_batch(split, args.step)
    _describe_batch(batch, args.split, args.step)
    if split.image_format is not None and split.image_format.palette and "targets" in batch:
        images, firsts = split.image_format, batch["tokens"][:, 0]
        batch = {"images": images.pixels(batch["targets"])}
        if images.num_classes:
            batch["labels"] = firsts - images.num_colors
    if "images" in batch:
        _draw(batch, workdir, split.name)
    elif "tokens" in batch and split.tokenizer is not None:
        for row in range(min(args.rows, len(batch["tokens"]))):
            print(f"\nrow {row}{_place(split, args.step, row)}")
            print(_indented(in_words({k: v[row] for k, v in batch.items()}, split.tokenizer)))
    return OK


def _describe_text(config: ExperimentConfig, prepared: list[Prepared], found: Datasets) -> None:
    data, train = config.data, found.train
    assert isinstance(train, TextBatches) and train.tokenizer is not None
    divided = partition.partition(prepared, data)
    num_tokens = sum(source.caches["train"].manifest["tokens"] for source in prepared)
    num_bytes = sum(source.caches["train"].manifest["bytes"] for source in prepared)
    print(
        f"tokenizer  {data.tokenizer or 'of the run'}, {train.vocab_size:,} tokens; "
        f"{num_bytes / max(num_tokens, 1):.3f} bytes per token"
    )
    for source in prepared:
        for name, tokens in source.caches.items():
            print(f"cache      {tokens.path}{f' ({name})' if len(source.caches) > 1 else ''}")
    rows = [("source", "split", "weight", "documents", "MB", "tokens", "rows", "epochs per run")]
    seen = train.mixture.seen(config.training.num_steps)
    total = max(int(seen.sum()), 1)
    for k, (source, parts) in enumerate(zip(prepared, divided, strict=True)):
        for split, part in parts.items():
            is_train, count = split == "train", train.sources[k].count
            weight = f"{seen[k] / total:.3f}" if is_train else ""
            if not is_train:
                count = pipeline.make_rows(part, data, split, None).count
            rows.append(
                (
                    source.caches.get(split, source.caches["train"]).manifest["source"]["name"],
                    split,
                    weight,
                    f"{len(part.spans):,}",
                    f"{part.num_bytes / 1e6:.2f}",
                    f"{part.num_tokens:,}",
                    f"{count:,}",
                    f"{seen[k] / count:.2f}" if is_train else "",
                )
            )
    print(_table(rows))
    words = {
        "concatenated": f"windows of {data.seq_len:,} tokens of running text",
        "packed": f"whole documents packed into rows of {data.seq_len:,} tokens",
        "rows": f"one document to a row of {data.seq_len:,} tokens",
    }
    order = "each row once before any twice" if data.order == "epochs" else "beginning anywhere"
    print(f"layout     {data.layout}: {words[data.layout]}, {order}")
    _describe(config, found)


def _describe(config: ExperimentConfig, found: Datasets) -> None:
    steps, epoch = config.training.num_steps, len(found.train)
    print(
        f"epoch      {epoch:,} batches of {config.data.batch_size:,}; the run of {steps:,} steps "
        f"is {steps / epoch:.2f} epochs"
    )
    for name in ("val", "test"):
        if split := getattr(found, name):
            print(f"{name:<10} {len(split):,} batches")


def _describe_batch(batch: Batch, split: str, step: int) -> None:
    arrays = ", ".join(f"{name} {a.dtype} {a.shape}" for name, a in batch.items())
    print(f"batch {step} of {split}: {arrays}")
    weights = batch.get("weights")
    if weights is not None:
        learned = np.count_nonzero(weights)
        print(f"learned    {learned:,} of {weights.size:,} ({learned / weights.size:.1%})")
    if "images" in batch:
        images = batch["images"]
        print(f"values     {images.min():.3f} to {images.max():.3f}")


def _table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if n < 2 else cell.rjust(width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _place(data: Dataset, step: int, row: int) -> str:
    place = data.place(step, row, 1)
    return f": {place}" if place else ""


def in_words(row: Batch, tokenizer: Tokenizer) -> str:
    """Returns a row of a batch as text: `[[...]]` around tokens outside the loss, documents apart.

    Padding at the end is counted, not shown. Special tokens show as they are spelled.
    """
    if "source" in row:
        source = tokenizer.decode(row["source"][row["source_mask"]])
        return f"{source} -> {tokenizer.decode(row['targets'][row['weights'] > 0])}"
    tokens, targets = row["tokens"], row["targets"]
    weights = row.get("weights", np.ones(len(targets)))
    segments = row.get("segments")
    if segments is None:
        used = np.flatnonzero((weights > 0) | (targets != 0) | (tokens != 0))
        count = int(used[-1]) + 1 if len(used) else 0
        segments = (np.arange(len(targets)) < count).astype(np.int32)
    lines = []
    for number in range(1, int(segments.max(initial=0)) + 1):
        here = np.flatnonzero(segments == number)
        # The first token has no prediction.
        in_loss = np.concatenate([[False], weights[here] > 0])
        ids = np.concatenate([tokens[here[:1]], targets[here]])
        text = ""
        for learned, group in itertools.groupby(
            zip(in_loss.tolist(), ids.tolist(), strict=True), key=lambda pair: pair[0]
        ):
            piece = tokenizer.decode([i for _, i in group], show_special=True)
            text += piece if learned else f"[[{piece}]]"
        lines.append(text)
    text = "\n---\n".join(lines)
    padding = int(np.count_nonzero(segments == 0))
    return f"{text}\n({padding} of {len(targets)} places are padding)" if padding else text


def _indented(text: str) -> str:
    return "\n".join(f"  | {line}" for line in text.split("\n"))


def _draw(batch: Batch, workdir: Path, name: str) -> None:
    pixels = importlib.import_module("craft_jax.data.images.pixels")
    file = outputs.picture_file(workdir, "data", name)
    pixels.save_png(file, shown(batch["images"][:_MAX_IMAGES], _GRID_COLUMNS))
    print(f"picture    {file}")
    if "labels" in batch:
        print(f"labels     {' '.join(map(str, batch['labels'][:_MAX_IMAGES].tolist()))}")
