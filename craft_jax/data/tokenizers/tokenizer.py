"""Tokenizers: characters, bytes, byte-level BPE trained here, or a `tokenizer.json` of the user's.

All of them are objects of the `tokenizers` library and one file format, so any of them can be read
by PyTorch tools. Text flows in, arrays of token ids flow out, and back. Text never turns into a
special token by spelling one: `<|endoftext|>` in a document is encoded as ordinary characters.
"""

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers.decoders import DecodeStream

from craft_jax.data.tokenizers import files, sentencepiece_models
from craft_jax.errors import UsageError

KINDS = ("char", "byte", "bpe")
END_TOKEN = "<|endoftext|>"
_END_TOKENS = (END_TOKEN, "</s>", "<eos>", "<EOS>", "[EOS]", "<|end_of_text|>", "<|eot_id|>")
_MAX_NAMED = 10
_MOST_OF_BYTES = 1024
_EACH_CHARACTER = r"[\s\S]"
_BY_CHARACTER = json.loads(
    pre_tokenizers.Split(Regex(_EACH_CHARACTER), "isolated").__getstate__().decode()
)


class Tokenizer:
    """Text to token ids and back.

    Attributes:
      vocab_size: one more than the largest id.
      end_id: the id that ends a document, or None if the vocabulary has no such token.

    Args:
      inner: that of the library.
      encoder: of a SentencePiece model, where it is at hand: it encodes in place of `inner`, which
        may choose another one of two splits that score alike.
    """

    def __init__(self, inner: tokenizers.Tokenizer, encoder: Any | None = None):
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
        self._encoder = encoder
        self._table = _Table.of(inner)
        self._markup: tokenizers.Tokenizer | None = None

    def __reduce__(self) -> tuple:
        return _restored, (self._inner.to_str(), self._encoder)

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Reads a `tokenizer.json`, a SentencePiece `.model`, or a folder of Hugging Face.

        Raises:
          DataError: there is none, or it cannot be read.
        """
        path = Path(path)
        inner = files.open_file(path)
        is_model = path.suffix == sentencepiece_models.SUFFIX and not path.is_dir()
        return cls(inner, sentencepiece_models.encoder(path.expanduser()) if is_model else None)

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
        if self._table is not None:
            ids_T = self._table.encode(text)
            if ids_T.size and ids_T.min() < 0:
                raise self._unknown(text, what)
            return ids_T
        if self._characters is not None and self.unknown_characters(text):
            raise self._unknown(text, what)
        if self._encoder is not None:
            return np.array(self._encoder.encode(text), np.int32)
        return np.array(self._inner.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the ids of each text, int32 (T,), encoding them in parallel.

        Raises:
          UsageError: see `encode`.
        """
        if self._table is not None or self._characters is not None:
            return [self.encode(text) for text in texts]
        if self._encoder is not None:
            threads = 1 if os.environ.get("TOKENIZERS_PARALLELISM") == "false" else -1
            encoded = self._encoder.encode(list(texts), num_threads=threads)
            return [np.array(ids, np.int32) for ids in encoded]
        found = self._inner.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in found]

    def encode_markup(self, text: str) -> np.ndarray:
        """Returns the ids of text of a template, where special tokens are what they spell.

        Raises:
          UsageError: a character vocabulary lacks some of its characters.
        """
        if self._markup is None:
            self._markup = tokenizers.Tokenizer.from_str(self._inner.to_str())
            self._markup.encode_special_tokens = False
        try:
            found = self._markup.encode(text, add_special_tokens=False)
        except Exception as error:  # The library raises bare Exception.
            raise self._unknown(text, "the template") from error
        return np.array(found.ids, np.int32)

    @functools.cached_property
    def drops_space(self) -> bool:
        """Whether the text after a space must lose it, to have the ids that it has in the whole.

        So it is where the space is written for each text that has none before it, as SentencePiece
        does.
        """
        if self._characters is not None:
            return False
        whole, before = "ab cd", "ab"
        joined = [*self._ids(before), *self._ids(" cd")]
        return joined != self._ids(whole) == [*self._ids(before), *self._ids("cd")]

    def _ids(self, text: str) -> list[int]:
        return self._inner.encode(text, add_special_tokens=False).ids

    def _unknown(self, text: str, what: str) -> UsageError:
        unknown = self.unknown_characters(text)
        named = ", ".join(f"{c!r} (U+{ord(c):04X})" for c in unknown[:_MAX_NAMED])
        more = f" and {len(unknown) - _MAX_NAMED} more" if len(unknown) > _MAX_NAMED else ""
        return UsageError(
            f"{what} has characters that this character tokenizer does not know: {named}"
            f"{more}; leave them out, or train with --config.data.tokenizer=byte or bpe"
        )

    def decode(self, ids: Iterable[int], show_special: bool = False) -> str:
        """Returns the text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        return self._inner.decode([int(i) for i in ids], skip_special_tokens=not show_special)

    def num_bytes(self, ids_N: np.ndarray) -> int:
        """Returns how many bytes of UTF-8 the text of some ids is, special tokens left out."""
        if self._sizes is None:
            return len(self.decode(ids_N.tolist()).encode())
        return int(self._sizes[ids_N].sum())

    @functools.cached_property
    def _sizes(self) -> np.ndarray | None:
        """The bytes of each id, int64 (V,); None where it depends on those beside it."""
        described = json.loads(self._inner.to_str())
        decoder = (described["decoder"] or {}).get("type")
        if decoder not in ("ByteLevel", "Fuse") or described["normalizer"]:
            return None
        sizes = np.zeros(self.vocab_size, np.int64)
        for token, number in self._inner.get_vocab(with_added_tokens=True).items():
            # A byte-level vocabulary writes each byte as one character.
            size = len(token) if decoder == "ByteLevel" else len(token.encode())
            sizes[number] = 0 if number in self.special_ids else size
        return sizes

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        """The ids of special tokens."""
        added = self._inner.get_added_tokens_decoder()
        return frozenset(number for number, token in added.items() if token.special)

    def token(self, token_id: int) -> str:
        """Returns the vocabulary's name of an id."""
        return self._inner.id_to_token(token_id)

    def unknown_characters(self, text: str) -> list[str]:
        """Returns the characters of `text` that have no id, nor a token that stands for them."""
        return [] if self._characters is None else sorted(set(text) - self._characters)

    def stream(self) -> "TextStream":
        """Returns a decoder for ids that arrive one by one."""
        return TextStream(self._inner)


def _restored(text: str, encoder: Any) -> Tokenizer:
    return Tokenizer(tokenizers.Tokenizer.from_str(text), encoder)


class _Table:
    """The ids of characters, or of bytes, in one array: what the library does, a hundred times as
    fast.

    Args:
      ids_C: int32, by code point or by byte; -1 where there is none. The last entry stands for all
        code points behind it.
      codec: `utf-32-le` or `utf-8`.
    """

    def __init__(self, ids_C: np.ndarray, codec: str):
        self._ids_C, self._codec = ids_C, codec

    @classmethod
    def of(cls, inner: tokenizers.Tokenizer) -> "_Table | None":
        """Returns the table that does what a tokenizer does; None where none does."""
        if isinstance(inner.model, models.BPE) and inner.get_vocab_size() > _MOST_OF_BYTES:
            return None  # It has merges, and reading them takes memory.
        described = json.loads(inner.to_str())
        model = described["model"]
        if described["normalizer"] or described["post_processor"]:
            return None
        if not all(token["special"] for token in described["added_tokens"]):
            return None
        if model["type"] == "WordLevel" and described["pre_tokenizer"] == _BY_CHARACTER:
            unknown = model["vocab"].get(model["unk_token"], -1)
            places = {ord(token): n for token, n in model["vocab"].items() if len(token) == 1}
            ids_C = np.full(max(places, default=0) + 2, unknown, np.int32)
            ids_C[list(places)] = list(places.values())
            return cls(ids_C, "utf-32-le")
        is_plain = model["type"] == "BPE" and not model["merges"] and not model["byte_fallback"]
        pre = described["pre_tokenizer"] or {}
        if is_plain and pre.get("type") == "ByteLevel" and not pre["add_prefix_space"]:
            found = [model["vocab"].get(character, -1) for character in _byte_characters()]
            if min(found) >= 0:
                return cls(np.array(found, np.int32), "utf-8")
        return None

    def encode(self, text: str) -> np.ndarray:
        """Returns the ids of a text, int32 (T,)."""
        if self._codec == "utf-8":
            return self._ids_C[np.frombuffer(text.encode(), np.uint8)]
        points = np.frombuffer(text.encode(self._codec, "surrogatepass"), "<u4")
        return self._ids_C[np.minimum(points, len(self._ids_C) - 1)]


def _byte_characters() -> list[str]:
    """Returns the character that byte-level vocabularies write for each byte, as GPT-2 chose it."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    others = {byte: chr(256 + n) for n, byte in enumerate(hidden)}
    return [others.get(byte, chr(byte)) for byte in range(256)]


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


def characters(alphabet: Iterable[str], end_token: bool, special: Iterable[str] = ()) -> Tokenizer:
    """Builds a tokenizer with one id for each character, in code point order.

    Args:
      alphabet: the characters; each becomes an id.
      end_token: adds an id that ends documents, after all others.
      special: more special tokens, after it.
    """
    vocabulary = {character: i for i, character in enumerate(sorted(set(alphabet)))}
    return numbered_characters(vocabulary, [*([END_TOKEN] if end_token else []), *special])


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
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(_EACH_CHARACTER), "isolated")
    inner.decoder = decoders.Fuse()
    if special := list(special):
        inner.add_special_tokens(special)
    return Tokenizer(inner)


def bytes_(special: Iterable[str] = ()) -> Tokenizer:
    """Builds the tokenizer with one id for each of the 256 bytes, and one that ends documents.

    Args:
      special: more special tokens, after it.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = _byte_level(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    inner.add_special_tokens([END_TOKEN, *special])
    return Tokenizer(inner)


def train_bpe(
    pieces: Iterable[str], vocab_size: int, special: Iterable[str] = (), progress: bool = False
) -> Tokenizer:
    """Trains byte-level BPE (Sennrich et al. 2016; bytes as in GPT-2) on `pieces`.

    Args:
      pieces: the text to learn merges from; read as a stream.
      vocab_size: the largest vocabulary: 256 bytes, the special tokens and the merges. Short texts
        can give fewer.
      special: special tokens beside that which ends documents.
      progress: shows bars on a terminal.
    """
    inner = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_TOKEN, *special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=progress,
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
