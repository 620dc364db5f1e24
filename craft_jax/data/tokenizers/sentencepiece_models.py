r"""SentencePiece models: a `.model` file flows in, an object of the `tokenizers` library comes out.

The object has the ids and the texts of the sentencepiece library. A model for which that cannot be
had is refused; nothing is converted approximately. What makes it hold:

- Normalizing. Rules for single characters are those of the file. Rules for sequences compose a
  letter and its marks, which NFC does too, but SentencePiece takes the longest known sequence and
  never reorders marks. Codes between the sequences keep NFC within each of them.
- BPE. SentencePiece merges the two neighbours whose union is the best piece. What happens inside a
  piece does not depend on its surroundings, so that only one way leads to each piece: the one that
  its own text takes. That way is its merge.
- Unigram. The best path does not change when every character adds the same to a score. This makes
  control symbols, which text must never produce, worse than any other path. Scores are whole
  numbers, so that sums are exact and survive JSON.

Two differences remain. The sentencepiece library sums scores of a unigram model as float32, so that
in a tie, or in a very long text, rounding chooses its path: whoever has the file asks that library
itself (`encoder`). And in a run of byte pieces that has bytes which are no UTF-8, the tokenizers
library writes U+FFFD for all bytes of the run.
"""

import functools
import importlib
import itertools
import math
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from craft_jax.errors import DataError

SUFFIX = ".model"
_SPACE = "\u2581"  # A space in a piece.
_UNIGRAM, _BPE, _WORD, _CHAR = 1, 2, 3, 4
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6

# Scores of a unigram model are multiples of 1 / _SCALE, written as whole numbers.
_SCALE = 2.0**24
_UNKNOWN_PENALTY = 10.0  # Of both libraries.

# Codes within a text that is being normalized: an escape character, and one that says what for. An
# escape character of the text itself becomes a code as well, so that no text is mistaken for one.
_ESCAPE = "\U0010fff0"
_LITERAL, _OUTER, _INNER, _BEGINNING, _SUFFIX, _KEPT = (
    _ESCAPE + chr(0x10FFF1 + number) for number in range(6)
)
_FIRST_PROTECTED = 0x10FFC0
_MAX_PROTECTED = 32
_FIRST_EXCEPTION = 0x10FF00
_MAX_EXCEPTIONS = 64

# Greek iota subscript: alone, folding case makes it a letter, but not below another letter.
_IOTA = "\u0345"


def convert(path: Path) -> tokenizers.Tokenizer:
    """Reads a SentencePiece `.model`.

    Args:
      path: the file.

    Returns:
      a tokenizer with the same ids and the same decoded texts, which does not read control symbols
      in text.

    Raises:
      DataError: it cannot be read, or has a feature that cannot be had exactly; or a package that
        reads it is missing.
    """
    return _Conversion(path).tokenizer()


class _Conversion:
    """One file on its way."""

    def __init__(self, path: Path):
        self.path = path
        proto = _read(path)
        self.trainer, self.rules = proto.trainer_spec, proto.normalizer_spec
        self.pieces = [piece.piece for piece in proto.pieces]
        self.types = [piece.type for piece in proto.pieces]
        self.scores = [piece.score for piece in proto.pieces]
        self.is_unigram = self.trainer.model_type == _UNIGRAM
        self.space = _SPACE if self.rules.escape_whitespaces else " "
        self.of_user = [p for p, t in self._typed() if t == _USER_DEFINED]
        self._check(proto)
        self.unknown = self.types.index(_UNKNOWN)

    def tokenizer(self) -> tokenizers.Tokenizer:
        inner = tokenizers.Tokenizer(self._unigram() if self.is_unigram else self._bpe())
        if steps := self._normalizer():
            inner.normalizer = normalizers.Sequence(steps)
        if splits := self._splits():
            inner.pre_tokenizer = pre_tokenizers.Sequence(splits)
        inner.decoder = decoders.Sequence(self._decoder())
        control = [piece for piece, kind in self._typed() if kind == _CONTROL]
        inner.add_special_tokens([AddedToken(p, special=True, normalized=False) for p in control])
        inner.encode_special_tokens = True
        return inner

    def _typed(self) -> Iterable[tuple[str, int]]:
        return zip(self.pieces, self.types, strict=True)

    def _refuse(self, why: str) -> NoReturn:
        raise DataError(
            f"tokenizer {self.path}: {why}; give a tokenizer.json, or train a model without this"
        )

    def _check(self, proto: Any) -> None:
        if self.types.count(_UNKNOWN) != 1 or len(set(self.pieces)) != len(self.pieces):
            raise _unreadable(self.path, "its pieces are not those of a model")
        if not all(map(math.isfinite, self.scores)):
            raise _unreadable(self.path, "a score is not a number")
        if self.trainer.model_type not in (_UNIGRAM, _BPE, _CHAR):
            self._refuse("models of type word have no exact equal in a tokenizer.json")
        if proto.denormalizer_spec.precompiled_charsmap:
            self._refuse("it has rules of denormalization")
        for piece, kind in self._typed():
            if kind == _UNUSED and not self.is_unigram:
                self._refuse(f"piece {piece!r} is marked unused")
            if len(piece) == 1 and kind not in (_NORMAL, _USER_DEFINED):
                self._refuse(f"a control, unknown or unused piece is the one character {piece!r}")
            # The library takes one space off each piece at the beginning, not off their text.
            if self.rules.remove_extra_whitespaces and piece.startswith(2 * _SPACE):
                self._refuse(f"it removes extra spaces, and piece {piece!r} begins with two")
        spelled = {piece for piece, kind in self._typed() if kind in (_NORMAL, _USER_DEFINED)}
        for piece, kind in self._typed():
            if kind in (_CONTROL, _UNKNOWN, _UNUSED, _BYTE) and not set(piece) & spelled:
                # Unknown characters in a row are one token, which would have this name.
                self._refuse(f"it knows no character of {piece!r}, which text could then spell")
        for piece in self.of_user:
            if " " in piece and self.rules.escape_whitespaces:
                self._refuse(f"user-defined symbol {piece!r} has a space, so that it never occurs")

    # ---- The model.

    def _unigram(self) -> models.Unigram:
        normal = [s for s, t in zip(self.scores, self.types, strict=True) if t == _NORMAL]
        low, high = min(normal, default=0.0), max(normal, default=0.0)
        # The library gives unknown characters 10 less than the least of all scores.
        unknown = round(_SCALE * (low - _UNKNOWN_PENALTY))
        # With this much per character, no name of a control symbol is as good as its characters
        # unknown, and the pieces below are the least of all.
        each = 2.0 ** math.ceil(math.log2(_SCALE * 8 * (_UNKNOWN_PENALTY + 1 + abs(low))))
        least = unknown + each + _UNKNOWN_PENALTY
        vocabulary = []
        for piece, kind, score in zip(self.pieces, self.types, self.scores, strict=True):
            if kind == _USER_DEFINED:
                score = len(piece.encode()) * high - 0.1  # noqa: PLW2901
            if kind in (_NORMAL, _USER_DEFINED):
                vocabulary.append((piece, round(_SCALE * score) + each * len(piece)))
            else:
                vocabulary.append((piece, least))
        for (piece, score), kind in zip(vocabulary, self.types, strict=True):
            if score < least:
                assert kind == _USER_DEFINED
                self._refuse(f"user-defined symbol {piece!r} scores less than unknown characters")
        return models.Unigram(vocabulary, self.unknown, self.trainer.byte_fallback)

    def _bpe(self) -> models.BPE:
        merges = [] if self.trainer.model_type == _CHAR else self._merges()
        self._traps = self._find_traps({left + right: (left, right) for left, right in merges})
        return models.BPE(
            vocab={piece: number for number, piece in enumerate(self.pieces)},
            merges=merges,
            unk_token=self.pieces[self.unknown],
            fuse_unk=True,
            byte_fallback=self.trainer.byte_fallback,
            # A symbol of the user's is a word of its own, and has no merges.
            ignore_merges=bool(self.of_user),
        )

    def _merges(self) -> list[tuple[str, str]]:
        scores = {
            piece: score
            for piece, kind, score in zip(self.pieces, self.types, self.scores, strict=True)
            if kind in (_NORMAL, _USER_DEFINED)
        }
        frozen = set(self.of_user)
        found = []
        for piece, kind in self._typed():
            if kind == _NORMAL and len(piece) > 1:
                symbols, last = _merge(list(piece), scores, frozen)
                if len(symbols) == 1:
                    found.append((-scores[piece], last))
        for _, pair in found:
            for side in pair:
                if side not in scores:
                    self._refuse(f"pieces are made of {side!r}, which is none")
        found.sort()
        for (one, pair), (other, _) in itertools.pairwise(found):
            if one == other:
                self._refuse(f"piece {''.join(pair)!r} and another have the same score")
        return [pair for _, pair in found]

    def _find_traps(self, ways: Mapping[str, tuple[str, str]]) -> list[tuple[str, str]]:
        """Returns the names that a whole word must not be, and what it is made of instead.

        A word that is a piece gets its id, which is right for those that merges make, and wrong for
        names such as `<s>`. Each comes with where to cut it: before the second part.
        """
        if not self.of_user:
            return []
        scores = {p: -rank for rank, p in enumerate(ways)}
        letters = {p for p, kind in self._typed() if kind == _NORMAL and len(p) == 1}
        traps = []
        for piece, kind in self._typed():
            if kind == _USER_DEFINED or piece in ways or len(piece) == 1:
                continue
            if any(symbol in piece for symbol in self.of_user):
                continue  # Never a word.
            symbols = _merge(list(piece), scores, frozenset())[0]
            # Not between two unknowns, which are one token.
            cut = next(
                i
                for i in range(1, len(symbols) + 1)
                if i == len(symbols)
                or symbols[i - 1] in letters | ways.keys()
                or symbols[i] in letters | ways.keys()
            )
            if cut == len(symbols):
                self._refuse(f"it knows no character of piece {piece!r}")
            traps.append(("".join(symbols[:cut]), "".join(symbols[cut:])))
        names = {left + right for left, right in traps}
        for trap in traps:
            if names & set(trap):
                self._refuse(f"text could spell piece {''.join(trap)!r}")
        return traps

    # ---- Words.

    def _splits(self) -> list[pre_tokenizers.PreTokenizer]:
        splits = []
        if self.of_user and not self.is_unigram:
            splits.append(pre_tokenizers.Split(Regex(_any_of(self.of_user)), "isolated"))
        if words := self._words():
            splits.append(pre_tokenizers.Split(Regex(words), "isolated"))
        if not self.is_unigram and self._traps:
            parts = (rf"{_quote(a)}(?={_quote(b)}\z)" for a, b in self._traps)
            splits.append(pre_tokenizers.Split(Regex(rf"\A(?:{'|'.join(parts)})"), "isolated"))
        return splits

    def _words(self) -> str | None:
        """Returns what a word is, if no piece can reach across two of them.

        This changes no id. Words are remembered, and encoding them takes linear time.
        """
        s = self.space
        used = [p for p, kind in self._typed() if kind in (_NORMAL, _USER_DEFINED)]
        if s not in used:  # Then it is unknown, and one token with unknown neighbours.
            return None
        if not any(re.search(f"[^{s}]{s}", piece) for piece in used):
            return f"{s}+[^{s}]*|[^{s}]+"
        if not any(re.search(f"{s}[^{s}]", piece) for piece in used):
            return f"[^{s}]*{s}+|[^{s}]+"
        return None

    # ---- Normalizing.

    def _normalizer(self) -> list[normalizers.Normalizer]:
        suffix = self.trainer.treat_whitespace_as_suffix
        if not self.rules.precompiled_charsmap and not suffix:
            return self._whitespace()
        charsmap = _charsmap(self.rules.precompiled_charsmap)
        if problem := charsmap.problem:
            self._refuse(problem)
        steps = []
        if self.rules.remove_extra_whitespaces:
            blank = [" ", *(c for c, to in charsmap.single.items() if to == " ")]
            blank = [c for c in blank if c not in self.of_user]
            steps.append(_replace(rf"\A[{_class(blank)}]+", ""))
        steps.append(normalizers.Replace(_ESCAPE, _LITERAL))
        # The library loses count when a pattern inserts before the first character, so a code
        # is always put there.
        steps.append(normalizers.Prepend(_BEGINNING))
        end = _SUFFIX if suffix and self.rules.add_dummy_prefix else ""
        if end:
            steps.append(_replace(r"\z", end))
        protected = self._protected(charsmap)
        codes = {c: _ESCAPE + chr(_FIRST_PROTECTED + i) for i, c in enumerate(protected)}
        steps += [normalizers.Replace(c, code) for c, code in codes.items()]
        steps += charsmap.steps(self.of_user)
        steps += self._whitespace(_BEGINNING, end)
        steps += [normalizers.Replace(code, c) for c, code in codes.items()]
        return [*steps, normalizers.Replace(_LITERAL, _ESCAPE)]

    def _protected(self, charsmap: "_Charsmap") -> list[str]:
        """Returns the user-defined symbols of one character that rules must not replace."""
        found = [p for p in self.of_user if p in charsmap.single]
        for symbol in self.of_user:
            changed = [c for c in symbol if c in charsmap.single and c not in found]
            if changed or symbol[0] in charsmap.marks or charsmap.composes(symbol):
                self._refuse(f"normalizing would change user-defined symbol {symbol!r}")
        if len(found) > _MAX_PROTECTED:
            self._refuse(f"normalizing would change {len(found)} user-defined symbols")
        return found

    def _whitespace(self, beginning: str = "", end: str = "") -> list[normalizers.Normalizer]:
        """Returns the steps that remove spaces, replace them and add the one that is not there.

        Args:
          beginning: a code before the text, which goes.
          end: a code after the text, which the added space replaces.
        """
        steps: list[normalizers.Normalizer] = []
        first = self.space if self.rules.add_dummy_prefix and not end else ""
        if self.rules.remove_extra_whitespaces:
            steps += [_replace(rf"\A{beginning} +", beginning), _replace(" {2,}", " ")]
        if self.space != " ":
            steps.append(normalizers.Replace(" ", self.space))
        if beginning:
            steps.append(normalizers.Replace(beginning, first))
        elif first:
            steps.append(normalizers.Prepend(first))
        if self.rules.remove_extra_whitespaces:
            steps.append(_replace(rf"{self.space}+(?={end}\z)", ""))
        if end:
            steps.append(normalizers.Replace(end, self.space))
        return steps

    # ---- Decoding.

    def _decoder(self) -> list[decoders.Decoder]:
        unknown = _quote(self.pieces[self.unknown])
        steps = [decoders.Replace(Regex(rf"\A{unknown}\z"), self.trainer.unk_surface)]
        if self.trainer.byte_fallback:
            steps.append(decoders.ByteFallback())
        steps.append(decoders.Fuse())
        if self.rules.remove_extra_whitespaces:
            steps.append(decoders.Replace(Regex(rf"\A{_SPACE}+"), ""))
        elif self.rules.add_dummy_prefix:
            steps.append(decoders.Replace(Regex(rf"\A{_SPACE}"), ""))
        steps.append(decoders.Replace(_SPACE, " "))
        return steps


class _Charsmap:
    """Rules that replace characters, and sequences of a first character and its marks.

    Attributes:
      single: what replaces a character.
      sequences: what replaces a sequence.
      marks: characters that stand in a sequence, not at its beginning.
      problem: why this cannot be had exactly, or None.
    """

    def __init__(self, blob: bytes):
        self._blob = blob
        rules = _decode_charsmap(blob)
        self.single = {k: v for k, v in rules.items() if len(k) == 1}
        self.sequences = {k: v for k, v in rules.items() if len(k) > 1}
        self.marks = {c for k in self.sequences for c in k[1:]}
        self._firsts = {k[0] for k in self.sequences}
        self._keeps_iota = _IOTA in self.single and _IOTA in self.marks
        self.problem = self._find_problem()

    def composes(self, text: str) -> bool:
        """Returns whether a sequence occurs in `text`."""
        return any(text[i : i + n] in self.sequences for i in range(len(text)) for n in range(2, 5))

    def steps(self, symbols: Iterable[str]) -> list[normalizers.Normalizer]:
        """Returns what does to a text what the rules say.

        Args:
          symbols: user-defined symbols, which never compose with a mark after them.
        """
        if not self._blob:
            return []
        within = self._within()
        joins = f"[{_class(self._joining())}]"
        steps = [normalizers.Replace(key, code) for key, code, _ in self._exceptions]
        if ends := sorted(
            {s for s in symbols if s[-1] in self._firsts}, key=lambda s: (-len(s), s)
        ):
            steps.append(_replace(rf"(?={joins})(?<={'|'.join(map(_quote, ends))})", _OUTER))
        if within:
            steps.append(_replace(rf"(?={joins})(?!{'|'.join(within)})", _OUTER))
        # The library's step looks at a character with its marks, and drops what it has no rule for.
        # Each of them gets a code in front, and is then looked at alone.
        steps.append(_replace(rf"(?={joins})(?<!{_OUTER})", _INNER))
        if self._keeps_iota:
            steps.append(normalizers.Replace(_INNER + _IOTA, _KEPT))
        steps.append(normalizers.Replace("\r\n", f"\r{_INNER}\n"))
        steps.append(normalizers.Precompiled(self._blob))
        steps.append(normalizers.Replace(_INNER, ""))
        if self._keeps_iota:
            steps.append(normalizers.Replace(_KEPT, _IOTA))
        if within:
            steps += [normalizers.NFC(), normalizers.Replace(_OUTER, "")]
        codes = {code: value for _, code, value in self._exceptions}
        return [*steps, *(normalizers.Replace(code, value) for code, value in codes.items())]

    def _find_problem(self) -> str | None:
        self._exceptions: list[tuple[str, str, str]] = []
        if any("\0" in key for key in self.single):
            return "its rules of normalization replace the character zero"
        if not self.sequences:
            return None
        parts = {}
        for key in self.sequences:
            if len(key) > 2 and key[:-1] not in self.sequences:
                return f"its rules of normalization know {key!r}, and not its beginning"
            parts[key] = "".join(
                c if i and c == _IOTA else self.single.get(c, c) for i, c in enumerate(key)
            )
        composed = dict(zip(parts, _compose(parts.values()), strict=True))
        others: dict[str, str] = {}
        for key, value in sorted(self.sequences.items()):
            if composed[key] != value or key[:-1] in others:
                others[key] = value
        # What the library does not compose: some newer letters, and some that folding case changes.
        # A code keeps the other steps away from what replaces them. The longest come first, which
        # is the longest at each place but for absurd runs of newer vowel signs.
        values = {value: number for number, value in enumerate(sorted(set(others.values())))}
        if len(others) > _MAX_EXCEPTIONS:
            return f"its rules of normalization replace sequences such as {next(iter(others))!r}"
        self._exceptions = [
            (key, _ESCAPE + chr(_FIRST_EXCEPTION + values[others[key]]), others[key])
            for key in sorted(others, key=lambda key: (-len(key), key))
        ]
        alone = [self.single.get(c, c) for c in map(chr, itertools.chain(*_ALL))]
        unknown = [c for c, same in zip(alone, _compose(alone), strict=True) if c != same]
        if unknown:
            return f"its rules of normalization replace sequences, but not {unknown[0]!r}"
        if any(self.single.get(c, c) == " " for c in self._firsts):
            return "its rules of normalization compose spaces"
        return None

    def _joining(self) -> set[str]:
        """Returns what belongs to the character before it, or composes or changes places with it.

        More than those do no harm. The tables are those of an old Unicode, so that every Python
        writes the same file; what is newer counts as joining.
        """
        category = unicodedata.ucd_3_2_0.category
        found = {c for c in map(chr, range(1, 0x20000)) if category(c) in ("Mn", "Mc", "Me", "Cn")}
        found |= self.marks
        found |= set(map(chr, [*range(0x1160, 0x1200), *range(0xD7B0, 0xD800)]))  # Hangul.
        found |= set("\u200c\u200d\uff9e\uff9f\u0e33\u0eb3\u1885\u1886")
        found |= set(map(chr, range(0xE0000, 0xE1000)))  # Tags.
        return found | {c for c, to in self.single.items() if to and to[0] in found}

    def _within(self) -> list[str]:
        """Returns the patterns of the places within a sequence."""
        patterns = []
        for length in range(2, max(map(len, self.sequences), default=0) + 1):
            following = defaultdict(set)
            for key in self.sequences:
                if len(key) == length:
                    following[key[:-1]].add(key[-1])
            for nexts, beginnings in _grouped(following).items():
                patterns += [f"(?=[{_class(nexts)}])(?<={b})" for b in _products(beginnings)]
        return patterns


# Every code point that can stand in a text, but for one that composes with nothing.
_BETWEEN = "\n"
_ALL = (range(1, ord(_BETWEEN)), range(ord(_BETWEEN) + 1, 0xD800), range(0xE000, 0x110000))


def encoder(path: Path) -> Any | None:
    """Returns the library's own processor of a unigram model; None for another kind of model.

    Args:
      path: a file that `convert` takes.

    Raises:
      DataError: it cannot be read.
    """
    proto = _read(path)
    if proto.trainer_spec.model_type != _UNIGRAM:
        return None
    return importlib.import_module("sentencepiece").SentencePieceProcessor(
        model_proto=proto.SerializeToString()
    )


@functools.lru_cache(maxsize=2)  # Reading one takes a second or two.
def _charsmap(blob: bytes) -> _Charsmap:
    return _Charsmap(blob)


def _read(path: Path) -> Any:
    """Returns the message of a file, and refuses what is none."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"tokenizer {path}: {error.strerror}; give a file that can be read"
        ) from None
    proto = _messages(path).ModelProto()
    try:
        proto.ParseFromString(data)
    except Exception as error:  # Its class is that of the package that reads it.
        raise _unreadable(path, str(error)) from None
    if not proto.pieces:
        raise _unreadable(path, "it has no pieces")
    return proto


def _messages(path: Path) -> ModuleType:
    try:
        return importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    except ImportError as error:
        raise DataError(
            f"tokenizer {path} is a SentencePiece model, and reading it needs a package ({error}); "
            "pip install sentencepiece protobuf, or give a tokenizer.json"
        ) from None


def _unreadable(path: Path, why: str) -> DataError:
    return DataError(
        f"tokenizer {path} is not a readable SentencePiece model: {why}; copy the file again, or "
        "give a tokenizer.json"
    )


def _merge(
    symbols: list[str], scores: Mapping[str, float], frozen: Iterable[str]
) -> tuple[list[str], tuple[str, str]]:
    """Merges the two neighbours whose union scores best, the leftmost of equals, while there are.

    Returns:
      what is left, and the last two that were merged.
    """
    last = ("", "")
    while True:
        best, where = -math.inf, -1
        for i in range(len(symbols) - 1):
            if symbols[i] in frozen or symbols[i + 1] in frozen:
                continue
            score = scores.get(symbols[i] + symbols[i + 1])
            if score is not None and score > best:
                best, where = score, i
        if where < 0:
            return symbols, last
        last = (symbols[where], symbols[where + 1])
        symbols = [*symbols[:where], "".join(last), *symbols[where + 2 :]]


def _decode_charsmap(blob: bytes) -> dict[str, str]:
    """Returns the rules of a `precompiled_charsmap`.

    It is the size of a double array (github.com/s-yata/darts-clone), that array, whose values are
    places, and the texts at those places, which end with a zero byte.
    """
    if not blob:
        return {}
    size = int.from_bytes(blob[:4], "little")
    units = np.frombuffer(blob, "<u4", size // 4, 4).astype(np.int64)
    texts = blob[4 + size :]
    labels = units & 0x800000FF
    steps = ((units >> 10) << ((units & 512) >> 6)).tolist()
    children = defaultdict(list)
    real = np.flatnonzero((labels > 0) & (labels < 256))
    for place, label in zip(real.tolist(), labels[real].tolist(), strict=True):
        children[place ^ label].append((label, place))
    rules = {}
    todo = [(steps[0], b"")]
    while todo:
        node, key = todo.pop()
        for label, place in children.get(node, ()):
            below = place ^ steps[place]
            longer = key + bytes([label])
            if units[place] >> 8 & 1:
                at = int(units[below]) & 0x7FFFFFFF
                rules[longer.decode()] = texts[at : texts.index(b"\0", at)].decode()
            todo.append((below, longer))
    return rules


def _compose(texts: Iterable[str]) -> list[str]:
    """Returns each of `texts` as the library's NFC leaves it."""
    return normalizers.NFC().normalize_str(_BETWEEN.join(texts)).split(_BETWEEN)


# ---- Regular expressions of the tokenizers library (Oniguruma).


def _replace(pattern: str, content: str) -> normalizers.Normalizer:
    return normalizers.Replace(Regex(pattern), content)


def _quote(text: str) -> str:
    return "".join(c if c.isascii() and c.isalnum() else f"\\x{{{ord(c):X}}}" for c in text)


def _class(characters: Iterable[str]) -> str:
    """Returns the content of a character class of `characters`."""
    ranges: list[list[int]] = []
    for code in sorted(map(ord, set(characters))):
        if ranges and ranges[-1][1] == code - 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    return "".join(
        f"\\x{{{first:X}}}" if first == last else f"\\x{{{first:X}}}-\\x{{{last:X}}}"
        for first, last in ranges
    )


def _any_of(texts: Iterable[str]) -> str:
    """Returns the pattern of the longest of `texts` at a place, quick for thousands of them."""
    rest = defaultdict(list)
    ends = False
    for text in texts:
        if text:
            rest[text[0]].append(text[1:])
        else:
            ends = True
    if not rest:
        return ""
    found = "|".join(_quote(first) + _any_of(others) for first, others in sorted(rest.items()))
    return f"(?:{found})" + ("?" if ends else "")


def _grouped(found: Mapping[str, set[str]]) -> dict[frozenset[str], list[str]]:
    """Returns the keys of each set."""
    groups = defaultdict(list)
    for key, values in found.items():
        groups[frozenset(values)].append(key)
    return groups


def _products(texts: Iterable[str]) -> list[str]:
    """Returns patterns of one length whose union is `texts`, all of that length."""
    firsts = defaultdict(set)
    for text in texts:
        firsts[text[1:]].add(text[0])
    patterns = []
    for characters, rests in _grouped(firsts).items():
        tails = _products(rests) if rests[0] else [""]
        patterns += [f"[{_class(characters)}]{tail}" for tail in tails]
    return patterns
