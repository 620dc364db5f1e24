"""Tokenizers: characters, bytes, byte-level BPE trained here, or a `tokenizer.json` of the user's.

All of them are objects of the `tokenizers` library and one file format, so any of them can be read
by PyTorch tools. Text flows in, arrays of token ids flow out, and back. Text never turns into a
special token by spelling one: `<|endoftext|>` in a document is encoded as ordinary characters.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers.decoders import DecodeStream

from craft_jax.errors import DataError, UsageError

KINDS = ("char", "byte", "bpe")
END_TOKEN = "<|endoftext|>"
_END_TOKENS = (END_TOKEN, "</s>", "<eos>", "<EOS>", "[EOS]", "<|end_of_text|>", "<|eot_id|>")
_MAX_NAMED = 10


class Tokenizer:
    """Text to token ids and back.

    Attributes:
      vocab_size: one more than the largest id.
      end_id: the id that ends a document, or None if the vocabulary has no such token.
    """

    def __init__(self, inner: tokenizers.Tokenizer):
        inner.encode_special_tokens = True
        inner.no_truncation()
        inner.no_padding()
        self._inner = inner
        vocabulary = inner.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self.end_id = next((vocabulary[t] for t in _END_TOKENS if t in vocabulary), None)
        # A character vocabulary is the only kind that has texts which it cannot spell, unless one
        # of its tokens stands for whatever is unknown.
        model = inner.model
        self._characters = (
            {token for token in vocabulary if len(token) == 1}
            if isinstance(model, models.WordLevel)
            and model.unk_token not in inner.get_vocab(with_added_tokens=False)
            else None
        )

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Reads a `tokenizer.json`, or the one in a folder.

        Raises:
          DataError: there is none, or the library cannot read it.
        """
        path = Path(path).expanduser()
        file = path / "tokenizer.json" if os.path.isdir(path) else path
        if not os.path.isfile(file):
            kinds = ", ".join(KINDS)
            raise DataError(f"tokenizer {path}: no such file; use {kinds}, or a tokenizer.json")
        try:
            return cls.parse(file.read_text(encoding="utf-8"))
        except Exception as error:  # The library raises bare Exception.
            raise DataError(f"tokenizer {file} is not a readable tokenizer.json: {error}") from None

    @classmethod
    def parse(cls, text: str) -> "Tokenizer":
        """Returns the tokenizer whose `json` is `text`."""
        return cls(tokenizers.Tokenizer.from_str(text))

    @property
    def json(self) -> str:
        """The whole tokenizer as the text of a `tokenizer.json`."""
        return self._inner.to_str(pretty=True)

    @property
    def digest(self) -> str:
        """SHA-256 of the tokenizer, hexadecimal: equal digests mean equal ids."""
        return hashlib.sha256(self._inner.to_str().encode()).hexdigest()

    def encode(self, text: str, what: str = "the text") -> np.ndarray:
        """Returns the ids of `text`, int32 (T,).

        Raises:
          UsageError: a character vocabulary lacks some of its characters, and a token for what is
            unknown; names them.
        """
        if unknown := self.unknown_characters(text):
            named = ", ".join(f"{c!r} (U+{ord(c):04X})" for c in unknown[:_MAX_NAMED])
            more = f" and {len(unknown) - _MAX_NAMED} more" if len(unknown) > _MAX_NAMED else ""
            raise UsageError(
                f"{what} has characters that this character tokenizer does not know: {named}"
                f"{more}; leave them out, or train with --config.data.tokenizer=byte or bpe"
            )
        return np.array(self._inner.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_pieces(self, pieces: Iterable[str], batch: int = 16) -> Iterator[list[int]]:
        """Yields the ids of each piece, in order, encoding `batch` of them in parallel."""
        for group in _grouped(pieces, batch):
            for encoding in self._inner.encode_batch_fast(group, add_special_tokens=False):
                yield encoding.ids

    def decode(self, ids: Iterable[int], show_special: bool = False) -> str:
        """Returns the text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        return self._inner.decode([int(i) for i in ids], skip_special_tokens=not show_special)

    def token(self, token_id: int) -> str:
        """Returns the vocabulary's name of an id."""
        return self._inner.id_to_token(token_id)

    def unknown_characters(self, text: str) -> list[str]:
        """Returns the characters of `text` that have no id, nor a token that stands for them."""
        return [] if self._characters is None else sorted(set(text) - self._characters)

    def stream(self) -> "TextStream":
        """Returns a decoder for ids that arrive one by one."""
        return TextStream(self._inner)


class TextStream:
    """Turns ids into text as they arrive, never half a character."""

    def __init__(self, inner: tokenizers.Tokenizer):
        self._inner = inner
        self._stream = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._written = 0

    def push(self, token: int) -> str:
        """Returns the text that is complete with this id; empty within a character."""
        self._ids.append(int(token))
        text = self._stream.step(self._inner, int(token)) or ""
        self._written += len(text)
        return text

    def finish(self) -> str:
        """Returns what is left: an unfinished character shows as U+FFFD."""
        return self._inner.decode(self._ids, skip_special_tokens=True)[self._written :]


def characters(alphabet: Iterable[str], end_token: bool) -> Tokenizer:
    """Builds a tokenizer with one id for each character, in code point order.

    Args:
      alphabet: the characters; each becomes an id.
      end_token: adds an id that ends documents, after all others.
    """
    vocabulary = {character: i for i, character in enumerate(sorted(set(alphabet)))}
    return numbered_characters(vocabulary, [END_TOKEN] if end_token else [])


def numbered_characters(
    vocabulary: Mapping[str, int], special: Iterable[str] = (), unknown: str | None = None
) -> Tokenizer:
    """Builds a tokenizer that gives each character the id that a vocabulary says.

    Args:
      vocabulary: id by character, and by special token where those have ids of their own.
      special: tokens that are no text; those without an id get the next ones.
      unknown: the token of `vocabulary` that stands for characters without an id; None for none.
    """
    inner = tokenizers.Tokenizer(models.WordLevel(dict(vocabulary), unk_token=unknown))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    if special := list(special):
        inner.add_special_tokens(special)
    return Tokenizer(inner)


def bytes_() -> Tokenizer:
    """Builds the tokenizer with one id for each of the 256 bytes, and one that ends documents."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = _byte_level(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    inner.add_special_tokens([END_TOKEN])
    return Tokenizer(inner)


def train_bpe(pieces: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains byte-level BPE (Sennrich et al. 2016; bytes as in GPT-2) on `pieces`.

    Args:
      pieces: the text to learn merges from.
      vocab_size: the largest vocabulary: 256 bytes, the end token and the merges. Short texts can
        give fewer.
    """
    inner = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(pieces, trainer)
    return Tokenizer(inner)


def open_fixed(tokenizer: str) -> Tokenizer:
    """Opens a tokenizer that needs no text to be made: `byte`, or the path of a `tokenizer.json`.

    Raises:
      UsageError: `char` or `bpe`.
      DataError: no file, or not a readable one.
    """
    if tokenizer == "byte":
        return bytes_()
    if tokenizer in KINDS:
        raise UsageError(
            f"--tokenizer={tokenizer}: a {tokenizer} tokenizer is made from text; give the path of "
            "a tokenizer.json"
        )
    return Tokenizer.load(tokenizer)


def _byte_level(model: models.Model) -> tokenizers.Tokenizer:
    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return inner


def _grouped(pieces: Iterable[str], size: int) -> Iterator[list[str]]:
    group: list[str] = []
    for piece in pieces:
        group.append(piece)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
