"""Character vocabularies of the original PyTorch Craft, as tokenizers of craft_jax, and back.

Craft kept a vocabulary as a dict from characters to ids: inside checkpoints, in JSON files or a
pickle beside them. Files and dicts of plain data flow in, a `Tokenizer` with the same ids flows
out; for exports, such a tokenizer flows in and the dicts flow out. Needs neither JAX nor torch.
"""

import json
import mmap
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from craft_jax.data import tokenizers
from craft_jax.data.tokenizers import Tokenizer
from interop.errors import CorruptFileError, listed
from interop.files import hugging_face
from interop.files.pickles import DamagedError, Machine, Reader, Stub

VOCAB, CONFIG, PICKLE = "vocab.json", "tokenizer_config.json", "char_tokenizer.pkl"
MODEL_TYPE = "char"
_MODEL_TYPES = (MODEL_TYPE, "char_level")
_FOLDER = "tokenizer"
_METADATA = "tokenizer_metadata.json"
# What Craft takes a special token to be where nothing is said about it.
_SPECIAL = {"pad": "<pad>", "unk": "<unk>", "bos": "<bos>", "eos": "<eos>"}
# Where the dicts of a checkpoint that has a vocabulary keep it.
_PLACES = ("tokenizer_data", "tokenizer", "vocab", "tokenizer_config")
_LARGEST_ID = 2**31 - 1
_PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")


def of_vocabulary(
    vocabulary: Mapping[str, int], special: Mapping[str, Any] | None = None
) -> Tokenizer:
    """Returns the tokenizer of a vocabulary, with the ids that it has.

    A special token that is in the vocabulary is one here, unless it is a single character, which
    stays text. If the one for unknown characters is there, they get its id, as in Craft; if not,
    they are an error, where Craft left them out.

    Args:
      vocabulary: id by character or special token, in any order, not necessarily without holes.
      special: names of special tokens: `unk_token` or `unk`, and so on; other entries are ignored.

    Raises:
      CorruptFileError: it is no vocabulary of characters.
    """
    names = _special_names(special or {})
    _check(vocabulary, names)
    present = {role: token for role, token in names.items() if token in vocabulary}
    return tokenizers.numbered_characters(
        vocabulary,
        sorted({token for token in present.values() if len(token) > 1}),
        present.get("unk"),
    )


def of_container(container: Mapping[Any, Any]) -> Tokenizer | None:
    """Returns the tokenizer of a checkpoint, or of a data file.

    It is `char_to_idx`, `idx_to_char` or both, at the top or in a dict such as `tokenizer_data`
    there; nanoGPT's `meta.pkl` calls them `stoi` and `itos`.

    Raises:
      CorruptFileError: they contradict each other, or are no vocabulary of characters.
    """
    for place in (container, *(container.get(name) for name in _PLACES)):
        fields = place.fields if isinstance(place, Stub) else place
        if not isinstance(fields, Mapping):
            continue
        for there, back in (("char_to_idx", "idx_to_char"), ("stoi", "itos")):
            if fields.get(there) or fields.get(back):
                maps = {"char_to_idx": fields.get(there), "idx_to_char": fields.get(back)}
                return _of_maps({**fields, **maps})
    return None


def read_folder(folder: Path) -> Tokenizer | None:
    """Reads the character vocabulary of a Craft folder, or of `tokenizer/` in it or beside it.

    Returns None where there is none, or another kind of tokenizer: `tokenizer.json`, GPT-2's
    files, SentencePiece.

    Raises:
      CorruptFileError: it is there and cannot be read, or is no vocabulary of characters.
      UnsafePickleError: `char_tokenizer.pkl` asks for code.
    """
    for place in _places(folder):
        if _holds_another(place):
            return None
        if (found := _read_place(place)) is not None:
            return found
        if _sentencepiece(place):
            return None
    return None


def read_file(file: Path) -> Tokenizer | None:
    """Reads the character vocabulary in a file: `vocab.json`, a tokenizer's or a data set's pickle.

    Returns None where there is none in it.

    Raises:
      CorruptFileError, UnsafePickleError: see `read_folder`.
    """
    if file.suffix != ".json":
        value = _read_pickle(file)
        return _named(file, of_container, value) if isinstance(value, Mapping) else None
    value = hugging_face.read_json(file)
    if isinstance(value.get("char_to_idx"), Mapping):
        return _named(file, _of_maps, value)
    return _named(file, of_vocabulary, value, _described(file.parent).get("special_tokens"))


def sentencepiece_note(folder: Path) -> str | None:
    """Returns what to say of a SentencePiece vocabulary that is where `read_folder` looks."""
    for place in _places(folder):
        if _holds_another(place):
            return None
        if file := _sentencepiece(place):
            return (
                f"tokenizer: {file} is a SentencePiece vocabulary, which is not read yet; name a "
                "tokenizer.json with --tokenizer"
            )
    return None


def vocabulary_of(tokenizer: Tokenizer) -> dict[str, int] | None:
    """Returns `char_to_idx`, special tokens included; None for a tokenizer of another kind."""
    inside = _inside(tokenizer)
    return None if inside is None else inside[0]


def special_of(tokenizer: Tokenizer) -> dict[str, Any] | None:
    """Returns what Craft's tokenizer_config.json has as `special_tokens`, or None as above."""
    inside = _inside(tokenizer)
    if inside is None:
        return None
    vocabulary, added, unknown = inside
    roles = {}
    for token in added:
        role = re.sub(r"\W", "", token).lower()
        if role in _SPECIAL:
            roles.setdefault(role, token)
    if tokenizer.end_id is not None:
        roles["eos"] = tokenizer.token(tokenizer.end_id)
    if unknown in vocabulary:
        roles["unk"] = unknown
    return {
        **{f"{role}_token": roles[role] for role in _SPECIAL if role in roles},
        **{f"{role}_id": vocabulary[roles[role]] for role in _SPECIAL if role in roles},
    }


def _special_names(special: Mapping[str, Any]) -> dict[str, str]:
    if not isinstance(special, Mapping):
        raise CorruptFileError(f"its special tokens are {type(special).__name__}, not a dict")
    names = {}
    for role, default in _SPECIAL.items():
        name = special.get(f"{role}_token", special.get(role, default))
        if not isinstance(name, str | None):
            raise CorruptFileError(f"its special token {role!r} is {name!r}, not text")
        if name:
            names[role] = name
    return names


def _check(vocabulary: Mapping[str, int], names: Mapping[str, str]) -> None:
    if not isinstance(vocabulary, Mapping):
        raise CorruptFileError(f"its vocabulary is {type(vocabulary).__name__}, not a dict")
    if not vocabulary:
        raise CorruptFileError("its vocabulary is empty")
    by_id: dict[int, str] = {}
    strange = []
    for token, number in vocabulary.items():
        if type(number) is not int or not 0 <= number <= _LARGEST_ID:
            raise CorruptFileError(
                f"its vocabulary gives {token!r:.80} the id {number!r:.80}, which is no whole "
                f"number from 0 to {_LARGEST_ID}"
            )
        if number in by_id:
            raise CorruptFileError(
                f"its vocabulary gives {by_id[number]!r:.80} and {token!r:.80} the same id {number}"
            )
        by_id[number] = token
        if not isinstance(token, str) or not _is_text(token):
            raise CorruptFileError(f"its vocabulary has {token!r:.80}, which is no text")
        if len(token) != 1 and token not in names.values():
            strange.append(f"{token!r:.80}")
    if strange:
        known = ", ".join(sorted(set(names.values())))
        raise CorruptFileError(
            f"its vocabulary has {len(strange)} entries that are neither single characters nor "
            f"special tokens ({known}): {listed(strange)}; it is no vocabulary of characters"
        )


def _is_text(token: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in token)


def _of_maps(fields: Mapping[Any, Any]) -> Tokenizer:
    """Returns the tokenizer of a dict with `char_to_idx`, `idx_to_char`, or both."""
    numbers, characters = fields.get("char_to_idx"), fields.get("idx_to_char")
    if characters:
        inverted = _inverted(characters)
        if numbers and (wrong := _difference(numbers, inverted)):
            raise CorruptFileError(
                f"its char_to_idx and idx_to_char contradict each other: {wrong}"
            )
        numbers = inverted
    config = fields.get("config")
    special = fields.get("special_tokens")
    if special is None and isinstance(config, Mapping):
        special = config.get("special_tokens")
    return of_vocabulary(numbers, special)


def _inverted(characters: Any) -> dict[Any, int]:
    """Returns id by character; JSON turns the ids of `idx_to_char` into text."""
    if not isinstance(characters, Mapping):
        raise CorruptFileError(f"its idx_to_char is {type(characters).__name__}, not a dict")
    found: dict[Any, int] = {}
    for key, character in characters.items():
        is_written = isinstance(key, str) and key.isdecimal() and len(key) < 20
        if not isinstance(character, str) or character in found:
            what = "twice" if isinstance(character, str) else "which is no text"
            raise CorruptFileError(f"its idx_to_char has {character!r:.80}, {what}")
        found[character] = int(key) if is_written else key
    return found


def _difference(numbers: Any, inverted: Mapping[Any, int]) -> str | None:
    if not isinstance(numbers, Mapping):
        return f"char_to_idx is {type(numbers).__name__}, not a dict"
    for token in {**numbers, **inverted}:
        one, other = numbers.get(token, "nothing"), inverted.get(token, "nothing")
        if one != other:
            return f"{token!r:.80} is {one!r:.80} in one and {other!r:.80} in the other"
    return None


def _places(folder: Path) -> Iterator[Path]:
    # Craft saves `tokenizer/` beside the folder of its checkpoints.
    for place in (folder, folder / _FOLDER, folder.absolute().parent / _FOLDER):
        if place.is_dir():
            yield place


def _holds_another(place: Path) -> bool:
    is_gpt2 = (place / VOCAB).is_file() and (place / "merges.txt").is_file()
    return is_gpt2 or (place / hugging_face.TOKENIZER).is_file()


def _sentencepiece(place: Path) -> Path | None:
    files = [*sorted(place.glob("*.model")), place / _METADATA]
    return next((file for file in files if file.is_file()), None)


def _read_place(place: Path) -> Tokenizer | None:
    described = _described(place)
    vocab, pickled = place / VOCAB, place / PICKLE
    if vocab.is_file():
        value = hugging_face.read_json(vocab)
        if isinstance(value.get("char_to_idx"), Mapping):
            return _named(vocab, _of_maps, value)
        if described.get("model_type") in _MODEL_TYPES:
            return _named(vocab, of_vocabulary, value, described.get("special_tokens"))
    if "char_to_idx" in described:
        return _named(place / CONFIG, _of_maps, described)
    return read_file(pickled) if pickled.is_file() else None


def _described(place: Path) -> dict[str, Any]:
    file = place / CONFIG
    return hugging_face.read_json(file) if file.is_file() else {}


def _named(file: Path, read: Any, *args: Any) -> Any:
    """Returns `read(*args)`; an error names the file."""
    try:
        return read(*args)
    except CorruptFileError as error:
        raise CorruptFileError(f"{file}: {error}", path=str(file)) from None


def _read_pickle(file: Path) -> Any:
    """Returns the plain data of a pickle; nothing in it is run."""
    try:
        with open(file, "rb") as opened:
            data = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError:
        raise CorruptFileError(f"{file} is an empty file", path=str(file)) from None
    except OSError as error:
        raise CorruptFileError(f"{file} cannot be read: {error}", path=str(file)) from None

    def machine() -> Machine:
        return Machine(Reader(data, 0, len(data)), file, (), lambda identity: None)

    try:
        return machine().load()
    except DamagedError as error:
        # A forbidden name behind the damage matters more than the damage.
        machine().check()
        raise CorruptFileError(f"{file} {error}", path=str(file)) from None


def _inside(tokenizer: Tokenizer) -> tuple[dict[str, int], list[str], str] | None:
    """Returns the vocabulary, the special tokens, and the token for unknown characters."""
    described = json.loads(tokenizer.json)
    typical = json.loads(tokenizers.characters("a", end_token=False).json)
    model = described["model"]
    if model["type"] != typical["model"]["type"] or any(
        described[part] != typical[part] for part in _PARTS
    ):
        return None
    added = {token["content"]: token["id"] for token in described["added_tokens"]}
    vocabulary = {**model["vocab"], **added}
    ordered = dict(sorted(vocabulary.items(), key=lambda entry: entry[1]))
    return ordered, [token for token in ordered if token in added], model["unk_token"]
