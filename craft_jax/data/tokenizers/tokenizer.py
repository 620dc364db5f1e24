"""Tokenizers: characters, bytes, byte-level BPE trained here, or a `tokenizer.json` of the user's.

All of them are objects of the `tokenizers` library with one file format, which PyTorch tools read.
Special tokens spelled out in text are encoded as ordinary characters.
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
      inner: the tokenizer of the library.
      encoder: of the SentencePiece `.model`, if available: it replaces `inner`, which may break
        ties between splits of equal score differently.
    """

    def __init__(self, inner: tokenizers.Tokenizer, encoder: Any | None = None):
        inner.encode_special_tokens = True
        inner.no_truncation()
        inner.no_padding()
        self._inner = inner
        vocabulary = inner.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self.end_id = next((vocabulary[t] for t in _END_TOKENS if t in vocabulary), None)
        # Only a character vocabulary without an unknown token cannot encode every text.
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
          DataError: it does not exist, or cannot be read.
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
          UsageError: a character vocabulary without an unknown token lacks some characters.
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
        """Returns the ids of text of a template, with special tokens parsed.

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
        """Returns whether a chunk that begins with a space must be encoded without that space.

        SentencePiece, for example, adds a space to the start of every text.
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
            f"{more}; remove them, or train with data.tokenizer=byte or bpe"
        )

    def decode(self, ids: Iterable[int], show_special: bool = False) -> str:
        """Returns the text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        return self._inner.decode([int(i) for i in ids], skip_special_tokens=not show_special)

    def num_bytes(self, ids_N: np.ndarray) -> int:
        """Returns the UTF-8 bytes of the text of some ids, without special tokens."""
        if self._sizes is None:
            return len(self.decode(ids_N.tolist()).encode())
        return int(self._sizes[ids_N].sum())

    @functools.cached_property
    def _sizes(self) -> np.ndarray | None:
        """The bytes of each id, int64 (V,); None if they depend on its neighbours."""
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
        """Returns the token of an id."""
        return self._inner.id_to_token(token_id)

    def unknown_characters(self, text: str) -> list[str]:
        """Returns the characters of `text` that cannot be encoded."""
        return [] if self._characters is None else sorted(set(text) - self._characters)

    def stream(self, prompt_ids: Iterable[int] = (), prompt: str = "") -> "TextStream":
        """Returns a decoder for ids that follow a prompt and arrive one by one."""
        return TextStream(self._inner, prompt_ids, prompt)

    def continuation(
        self, new: Iterable[int], prompt_ids: Iterable[int] = (), prompt: str = ""
    ) -> str:
        """Returns the text of ids that follow a prompt, as `stream` shows it."""
        stream = self.stream(prompt_ids, prompt)
        return "".join(map(stream.push, new)) + stream.finish()


def _restored(text: str, encoder: Any) -> Tokenizer:
    return Tokenizer(tokenizers.Tokenizer.from_str(text), encoder)


class _Table:
    """A lookup table of characters or bytes, a hundred times faster than the library.

    Args:
      ids_C: int32, by code point or byte, -1 for none; the last entry is for all higher ones.
      codec: `utf-32-le` or `utf-8`.
    """

    def __init__(self, ids_C: np.ndarray, codec: str):
        self._ids_C, self._codec = ids_C, codec

    @classmethod
    def of(cls, inner: tokenizers.Tokenizer) -> "_Table | None":
        """Returns the table equivalent to a tokenizer; None if there is none."""
        if isinstance(inner.model, models.BPE) and inner.get_vocab_size() > _MOST_OF_BYTES:
            return None  # It has merges; skips the memory to parse them.
        described = json.loads(inner.to_str())
        model = described["model"]
        if described["normalizer"] or described["post_processor"]:
            return None
        if not all(token["special"] for token in described["added_tokens"]):
            return None
        if model["type"] == "WordLevel" and described["pre_tokenizer"] == _BY_CHARACTER:
            unknown = model["vocab"].get(model["unk_token"], -1)
            points = {ord(token): n for token, n in model["vocab"].items() if len(token) == 1}
            ids_C = np.full(max(points, default=0) + 2, unknown, np.int32)
            ids_C[list(points)] = list(points.values())
            return cls(ids_C, "utf-32-le")
        is_plain = model["type"] == "BPE" and not model["merges"] and not model["byte_fallback"]
        pre = described["pre_tokenizer"] or {}
        if is_plain and pre.get("type") == "ByteLevel" and not pre["add_prefix_space"]:
            ids = [model["vocab"].get(character, -1) for character in _byte_characters()]
            if min(ids) >= 0:
                return cls(np.array(ids, np.int32), "utf-8")
        return None

    def encode(self, text: str) -> np.ndarray:
        """Returns the ids of a text, int32 (T,)."""
        if self._codec == "utf-8":
            return self._ids_C[np.frombuffer(text.encode(), np.uint8)]
        points = np.frombuffer(text.encode(self._codec, "surrogatepass"), "<u4")
        return self._ids_C[np.minimum(points, len(self._ids_C) - 1)]


def _byte_characters() -> list[str]:
    """Returns the character of each byte in byte-level vocabularies, as in GPT-2."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    others = {byte: chr(256 + n) for n, byte in enumerate(hidden)}
    return [others.get(byte, chr(byte)) for byte in range(256)]


class TextStream:
    """Decodes the ids after a prompt one by one, yielding only complete characters.

    The ids are decoded together with those before them: many tokenizers write the space before a
    word into its token, and drop it at the beginning of a text.

    Args:
      inner: the tokenizer of the library.
      prompt_ids: the ids before the first one.
      prompt: the text that they encode; empty if it is not shown.
    """

    def __init__(
        self, inner: tokenizers.Tokenizer, prompt_ids: Iterable[int] = (), prompt: str = ""
    ):
        self._inner = inner
        self._ids = [int(i) for i in prompt_ids]
        self._num_shown, self._shown = len(self._ids), self._decode()
        # Some tokenizers drop the spaces at the end of a text, and the next token brings one.
        spaces = prompt[len(prompt.rstrip()) :]
        self._surplus = "" if self._shown.endswith(spaces) else spaces

    def push(self, token: int) -> str:
        """Returns the text completed by this id; empty within a character."""
        self._ids.append(int(token))
        text = self._decode()
        return "" if text.endswith("\ufffd") else self._rest(text)

    def finish(self) -> str:
        """Returns the remaining text: an incomplete character becomes U+FFFD."""
        return self._rest(self._decode())

    def _rest(self, text: str) -> str:
        """Returns the part of a text that was not shown; its ids become the context of the next."""
        rest = text[len(self._shown) :]
        if rest:
            rest, self._surplus = rest.removeprefix(self._surplus), ""
            self._ids = self._ids[self._num_shown :]
            self._num_shown, self._shown = len(self._ids), self._decode()
        return rest

    def _decode(self) -> str:
        return self._inner.decode(self._ids, skip_special_tokens=True)


def characters(alphabet: Iterable[str], end_token: bool, special: Iterable[str] = ()) -> Tokenizer:
    """Builds a tokenizer with one id for each character, in code point order.

    Args:
      alphabet: the characters; each becomes an id.
      end_token: whether to append the end token of documents.
      special: further special tokens.
    """
    vocabulary = {character: i for i, character in enumerate(sorted(set(alphabet)))}
    return numbered_characters(vocabulary, [*([END_TOKEN] if end_token else []), *special])


def numbered_characters(
    vocabulary: Mapping[str, int], special: Iterable[str] = (), unknown: str | None = None
) -> Tokenizer:
    """Builds a tokenizer with the given id for each character.

    Args:
      vocabulary: ids of characters, and of special tokens with fixed ids.
      special: special tokens; those without an id get the next ones.
      unknown: the token of `vocabulary` for characters without an id; None for none.
    """
    inner = tokenizers.Tokenizer(models.WordLevel(dict(vocabulary), unk_token=unknown))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(_EACH_CHARACTER), "isolated")
    inner.decoder = decoders.Fuse()
    if special := list(special):
        inner.add_special_tokens(special)
    return Tokenizer(inner)


def bytes_(special: Iterable[str] = ()) -> Tokenizer:
    """Builds the tokenizer of 256 bytes and the end token.

    Args:
      special: further special tokens.
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
      pieces: the training text, as a stream.
      vocab_size: the most tokens: 256 bytes, special tokens and merges; fewer for short texts.
      special: special tokens besides the end token.
      progress: whether to show progress bars.
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
    """Opens a tokenizer that needs no training: `byte`, or a path.

    Raises:
      UsageError: `char` or `bpe`.
      DataError: no file, or not a readable one.
    """
    if tokenizer == "byte":
        return bytes_()
    if tokenizer in KINDS:
        raise UsageError(
            f"data.tokenizer={tokenizer}: a {tokenizer} tokenizer needs training text; give the "
            "path of a tokenizer.json"
        )
    return Tokenizer.load(tokenizer)


def _byte_level(model: models.Model) -> tokenizers.Tokenizer:
    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return inner
