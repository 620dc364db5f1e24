"""The splits of tokenized sources: which spans of which cache train, validate and test."""

import logging
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from craft_jax.data import splits
from craft_jax.data.cache.token_cache import TokenCache
from craft_jax.data.settings import DataConfig, MixtureComponent
from craft_jax.data.splits import Fractions

logger = logging.getLogger(__name__)

SPLIT_WORDS = {"train": "training", "val": "validation", "test": "test"}
_BLOCK = 1 << 22


class Prepared(NamedTuple):
    """One source of a config, tokenized.

    Attributes:
      component: the source, and its weight in the mixture.
      caches: by split, where the source or the config names splits; else only `train`, from which
        the others are held out.
    """

    component: MixtureComponent
    caches: Mapping[str, TokenCache]


class SplitPart(NamedTuple):
    """The documents of a cache in one split.

    Attributes:
      cache: with their tokens.
      spans: start and end of each document, or of the kept part of it, int64 (M, 2).
      keys: of each document, uint64 (M,).
      num_bytes: UTF-8 bytes of the text; with a loss mask, of the text that counts in the loss.
    """

    cache: TokenCache
    spans: np.ndarray
    keys: np.ndarray
    num_bytes: int

    @property
    def num_tokens(self) -> int:
        return int((self.spans[:, 1] - self.spans[:, 0]).sum())


def partition(prepared: list[Prepared], config: DataConfig) -> list[dict[str, SplitPart]]:
    """Returns the part of each source in each split; empty splits are left out.

    Removes test documents from the validation split, and both from the training split, also those
    of other sources and of named splits.
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
    """Returns whether a document can be in two splits: not if keys alone decide."""
    by_key = (
        len(prepared) == 1
        and len(prepared[0].caches) == 1
        and config.hold_out != "tail"
        and len(prepared[0].caches["train"].documents) >= splits.FEWEST
    )
    return not by_key


def _divided(prepared: Prepared, config: DataConfig) -> dict[str, SplitPart]:
    parts = _by_fraction(prepared.caches["train"], config.fractions, config.hold_out)
    for name in ("val", "test"):
        if name in prepared.caches:
            parts[name] = _by_fraction(prepared.caches[name], Fractions(), "documents")["train"]
    return parts


def _by_fraction(cache: TokenCache, fractions: Fractions, hold_out: str) -> dict[str, SplitPart]:
    documents = cache.documents
    keys = np.asarray(documents["key"])
    bounds = np.append(documents["start"], len(cache.tokens)).astype(np.int64)
    spans = np.stack([bounds[:-1], bounds[1:]], axis=1)
    is_tail = hold_out == "tail" or (hold_out == "auto" and len(documents) < splits.FEWEST)
    if is_tail and any(fractions):
        ranges = splits.by_position(len(cache.tokens), fractions)
        names = ("train", *splits.held_out(fractions))
        return {name: _range(cache, spans, keys, *ranges[name]) for name in names}
    parts = {}
    for name, chosen in splits.by_key(keys, fractions).items():
        numbers = chosen
        if name != "train":  # Sorted by key, so that `_first` takes a fair sample.
            numbers = chosen[np.argsort(keys[chosen], kind="stable")]
        if len(numbers) or name == "train":
            here = spans[numbers]
            is_plain = cache.loss_mask is None
            size = documents["bytes"][numbers].sum() if is_plain else _text_bytes(cache, here)
            parts[name] = SplitPart(cache, here, keys[numbers], int(size))
    return parts


def _without(part: SplitPart, every: np.ndarray, own: list[np.ndarray], split: str) -> SplitPart:
    """Returns a part without held-out documents, except the one that the cut divides.

    Args:
      part: of one source.
      every: keys of the held-out documents of all sources.
      own: keys of those of the same source.
      split: its name, for the message.
    """
    is_held = np.isin(part.keys, every)
    if not is_held.any():
        return part
    # With hold_out=tail, the cut can divide a document, which is then on both sides.
    edges = part.spans[:, 1]
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
        SPLIT_WORDS[split],
    )
    size = part.num_bytes - _text_bytes(part.cache, part.spans[is_held])
    return SplitPart(part.cache, part.spans[~is_held], part.keys[~is_held], size)


def _range(
    cache: TokenCache, spans: np.ndarray, keys: np.ndarray, start: int, stop: int
) -> SplitPart:
    """Returns the documents between two tokens, cut to them."""
    is_inside = (spans[:, 1] > start) & (spans[:, 0] < stop)
    cut = np.clip(spans[is_inside], start, stop)
    return SplitPart(cache, cut, keys[is_inside], _text_bytes(cache, cut))


def _text_bytes(cache: TokenCache, spans: np.ndarray) -> int:
    """Returns the UTF-8 bytes of the text in some spans that counts in the loss."""
    total = 0
    for first, last in spans.tolist():
        for start in range(first, last, _BLOCK):
            stop = min(start + _BLOCK, last)
            ids = cache.tokens.read(start, stop)
            if cache.loss_mask is not None:
                ids = ids[cache.loss_mask.read(start, stop) > 0]
            total += cache.tokenizer.num_bytes(ids)
    return total


def _first(part: SplitPart, max_tokens: int) -> SplitPart:
    """Returns the first documents of a part, up to `max_tokens`; the last may be cut."""
    if part.num_tokens <= max_tokens:
        return part
    ends = np.cumsum(part.spans[:, 1] - part.spans[:, 0])
    count = int(np.searchsorted(ends, max_tokens)) + 1
    spans = part.spans[:count].copy()
    spans[-1, 1] -= int(ends[count - 1]) - max_tokens
    return SplitPart(part.cache, spans, part.keys[:count], _text_bytes(part.cache, spans))
