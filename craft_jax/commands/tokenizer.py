"""tokenizer: makes or opens the tokenizer of a config, and says how it does on its text."""

import argparse
import itertools
import os
import time
from pathlib import Path

from craft_jax import outputs
from craft_jax.commands import data_config
from craft_jax.data import pipeline
from craft_jax.data.splits import Fractions
from craft_jax.data.tokenizers import KINDS, Tokenizer, vocabulary
from craft_jax.errors import OK, OutputError, UsageError

_MEASURED_CHARS = 1 << 20
_SHOWN_TOKENS = 60
_LONGEST = 8


def run(args: argparse.Namespace) -> int:
    """Prints size, bytes per token and a sample split; with `--out`, writes a tokenizer.json."""
    config, tokenizer, workdir = data_config.choose(args)
    data = config.data
    if data.dataset or data.pairs or pipeline.is_of_images(data):
        raise UsageError("tokenizer is for text: name it with data.path, or data.source")
    if data.tokenizer is None and tokenizer is None:
        raise UsageError(pipeline.NO_TOKENIZER)
    out = Path(args.out).expanduser() if args.out else None
    if out and os.path.lexists(out):
        raise OutputError(f"`out={out}`: it exists; name another file, or remove it")
    sources = [found["train"] for _, found in pipeline.open_sources(data)]
    made = tokenizer or pipeline.make_tokenizer(data, workdir, sources)
    kind = data.tokenizer if data.tokenizer in KINDS else "as it came"
    print(f"tokenizer        {kind}, {made.vocab_size:,} tokens, digest {made.digest[:16]}")
    end = None if made.end_id is None else f"{made.token(made.end_id)!r} ({made.end_id})"
    print(f"end token        {end or 'none'}")
    for source in sources:
        quota = _MEASURED_CHARS // len(sources)
        texts = vocabulary.sample(source, data.format, Fractions(), "documents", quota)
        _report(made, source.name, list(itertools.islice(texts, _MEASURED_CHARS)))
    print(f"longest tokens   {'  '.join(_longest(made))}")
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        outputs.write_text(out, made.json)
        print(f"written to       {out}")
    return OK


def _report(tokenizer: Tokenizer, name: str, texts: list[str]) -> None:
    start = time.monotonic()
    encoded = tokenizer.encode_batch(texts)
    seconds = time.monotonic() - start
    num_bytes, num_tokens = (sum(map(len, x)) for x in ([t.encode() for t in texts], encoded))
    print(
        f"bytes per token  {num_bytes / max(num_tokens, 1):.3f} on {num_bytes / 1e6:.2f} MB of "
        f"{name}, at {num_bytes / 1e6 / max(seconds, 1e-9):.1f} MB/s"
    )
    if encoded:
        ids = encoded[len(encoded) // 2][:_SHOWN_TOKENS].tolist()
        print(f"sample split     {'|'.join(_shown(tokenizer, i) for i in ids)}")


def _longest(tokenizer: Tokenizer) -> list[str]:
    special = tokenizer.special_ids
    shown = {_shown(tokenizer, i) for i in range(tokenizer.vocab_size) if i not in special}
    return [repr(t) for t in sorted(shown, key=lambda t: (-len(t), t))[:_LONGEST]]


def _shown(tokenizer: Tokenizer, token_id: int) -> str:
    text = tokenizer.decode([token_id], show_special=True)
    if not text or "\ufffd" in text:  # Part of a character.
        text = tokenizer.token(token_id)
    return text.replace("\n", "\u21b5").replace("\t", "\u21e5")
