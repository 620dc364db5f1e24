"""Opens files of tokenizers as objects of the `tokenizers` library.

The path is a `tokenizer.json`, a SentencePiece `.model`, or a folder as Hugging Face writes it. A
`tokenizer.json` is complete. The meaning of older files depends on the class that reads them, so
they are opened for known classes only. No code in a folder is executed.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from craft_jax.data.tokenizers import sentencepiece_models
from craft_jax.errors import DataError

# Classes, without `Fast`, whose ids equal those of the files. The first is the default.
_SENTENCEPIECE = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer")
_BYTE_LEVEL = ("GPT2Tokenizer", "RobertaTokenizer", "BartTokenizer", "LongformerTokenizer")
_WORD_PIECE = ("BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer")

# Classes by `model_type` of `config.json`.
_CLASS_OF_MODEL = {
    "albert": "AlbertTokenizer",
    "bart": "BartTokenizer",
    "bert": "BertTokenizer",
    "big_bird": "BigBirdTokenizer",
    "camembert": "CamembertTokenizer",
    "clip": "CLIPTokenizer",
    "code_llama": "CodeLlamaTokenizer",
    "deberta": "DebertaTokenizer",
    "deberta-v2": "DebertaV2Tokenizer",
    "distilbert": "DistilBertTokenizer",
    "electra": "ElectraTokenizer",
    "gemma": "GemmaTokenizer",
    "gemma2": "GemmaTokenizer",
    "gpt2": "GPT2Tokenizer",
    "llama": "LlamaTokenizer",
    "longformer": "LongformerTokenizer",
    "marian": "MarianTokenizer",
    "mbart": "MBartTokenizer",
    "mistral": "LlamaTokenizer",
    "mixtral": "LlamaTokenizer",
    "mt5": "T5Tokenizer",
    "pegasus": "PegasusTokenizer",
    "qwen2": "Qwen2Tokenizer",
    "roberta": "RobertaTokenizer",
    "t5": "T5Tokenizer",
    "umt5": "T5Tokenizer",
    "xlm-roberta": "XLMRobertaTokenizer",
    "xlnet": "XLNetTokenizer",
}

_MODEL_NAMES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_SPECIAL_NAMES = "bos_token eos_token unk_token sep_token pad_token cls_token mask_token".split()


def open_file(path: Path) -> tokenizers.Tokenizer:
    """Opens a tokenizer file or folder.

    Args:
      path: a `tokenizer.json`, a SentencePiece `.model`, or a folder that has one of them, or
        `vocab.json` and `merges.txt` (byte-level BPE), or `vocab.txt` (WordPiece).

    Raises:
      DataError: it does not exist, cannot be read, or its ids would differ from those of its class.
    """
    path = path.expanduser()
    if path.is_dir():
        return _open_folder(path)
    if not path.is_file():
        raise DataError(f"tokenizer {path}: no such file; use char, byte, bpe, or a tokenizer.json")
    if path.suffix == sentencepiece_models.SUFFIX:
        return sentencepiece_models.convert(path)
    return _open_json(path)


def _open_json(path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # The library raises bare Exception.
        raise DataError(f"tokenizer {path} is not a readable tokenizer.json: {error}") from None


def _open_folder(folder: Path) -> tokenizers.Tokenizer:
    if (folder / "tokenizer.json").is_file():
        return _open_json(folder / "tokenizer.json")
    settings = _settings(folder)
    if model := _sentencepiece_file(folder):
        _check_class(folder, settings, model.name, _SENTENCEPIECE)
        return _with_added(sentencepiece_models.convert(model), folder, settings)
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        _check_class(folder, settings, "vocab.json and merges.txt", _BYTE_LEVEL)
        return _open_byte_level(folder, settings)
    if (folder / "vocab.txt").is_file():
        _check_class(folder, settings, "vocab.txt", _WORD_PIECE)
        return _open_word_piece(folder, settings)
    raise DataError(
        f"tokenizer {folder}: no such file as tokenizer.json, tokenizer.model, vocab.json with "
        "merges.txt, or vocab.txt; use char, byte, bpe, or a tokenizer.json"
    )


def _sentencepiece_file(folder: Path) -> Path | None:
    for name in _MODEL_NAMES:
        if (folder / name).is_file():
            return folder / name
    found = sorted(folder.glob("*.model"))
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise DataError(f"tokenizer {folder} has {names}; give the path of one of them")
    return found[0] if found else None


def _check_class(
    folder: Path, settings: Mapping[str, Any], files: str, known: Iterable[str]
) -> None:
    """Raises DataError for a class that is unknown, or whose ids differ from the files."""
    name = settings.get("tokenizer_class")
    if name is None and files == "sentencepiece.bpe.model":
        name = "XLMRobertaTokenizer"  # The name of such a file with fairseq's ids.
    generic = (None, "PreTrainedTokenizer", "PreTrainedTokenizerFast", "TokenizersBackend")
    if name not in generic and str(name).removesuffix("Fast") not in known:
        raise DataError(
            f"tokenizer {folder}: the ids of {name} are not those of {files} alone; save it as a "
            "tokenizer.json (AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER))"
        )


def _open_byte_level(folder: Path, settings: Mapping[str, Any]) -> tokenizers.Tokenizer:
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    try:
        model = models.BPE(*models.BPE.read_file(str(vocab), str(merges)))
    except Exception as error:  # The library raises bare Exception.
        raise DataError(
            f"tokenizer {vocab} with {merges.name} is not readable: {error}; copy the files again, "
            "or give a tokenizer.json"
        ) from None
    inner = tokenizers.Tokenizer(model)
    if missing := set(pre_tokenizers.ByteLevel.alphabet()) - inner.get_vocab().keys():
        raise DataError(
            f"tokenizer {vocab} is not of bytes: it lacks {len(missing)} of 256; give a "
            "tokenizer.json"
        )
    prefix = bool(settings.get("add_prefix_space", False))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    inner.decoder = decoders.ByteLevel()
    usual = ["<|endoftext|>"]
    if _class_of(settings) != "GPT2Tokenizer":
        usual = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    return _with_special(_with_added(inner, folder, settings), settings, usual)


def _open_word_piece(folder: Path, settings: Mapping[str, Any]) -> tokenizers.Tokenizer:
    file = folder / "vocab.txt"
    try:
        vocabulary = models.WordPiece.read_file(str(file))
    except Exception as error:  # The library raises bare Exception.
        raise DataError(
            f"tokenizer {file} is not readable: {error}; copy the file again, or give a "
            "tokenizer.json"
        ) from None
    unknown = _content(settings.get("unk_token", "[UNK]"))
    if unknown not in vocabulary:
        raise DataError(f"tokenizer {file} has no {unknown}; give a tokenizer.json")
    inner = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token=unknown))
    inner.normalizer = normalizers.BertNormalizer(
        lowercase=bool(settings.get("do_lower_case", True)),
        strip_accents=settings.get("strip_accents"),
        handle_chinese_chars=bool(settings.get("tokenize_chinese_chars", True)),
    )
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece()
    usual = ["[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]"]
    return _with_special(_with_added(inner, folder, settings), settings, usual)


# Settings and special tokens of a folder.


def _settings(folder: Path) -> dict[str, Any]:
    """Returns the settings of a folder: special tokens and class."""
    found = {
        **_read_json(folder / "special_tokens_map.json"),
        **_read_json(folder / "tokenizer_config.json"),
    }
    if found.get("tokenizer_class") is None:
        config = _read_json(folder / "config.json")
        model = config.get("model_type")
        found["tokenizer_class"] = config.get("tokenizer_class") or _CLASS_OF_MODEL.get(model)
    return found


def _class_of(settings: Mapping[str, Any]) -> str:
    return str(settings.get("tokenizer_class") or "GPT2Tokenizer").removesuffix("Fast")


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"tokenizer {path} is not readable: {error}; copy the file again, or give a "
            "tokenizer.json"
        ) from None
    if not isinstance(found, dict):
        raise DataError(f"tokenizer {path} is not a JSON object; copy the file again")
    return found


def _content(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) and "content" in token else token)


def _with_added(
    inner: tokenizers.Tokenizer, folder: Path, settings: Mapping[str, Any]
) -> tokenizers.Tokenizer:
    """Returns a tokenizer with the added tokens of its folder."""
    vocabulary = inner.get_vocab(with_added_tokens=True)
    size = max(vocabulary.values(), default=-1) + 1
    special = _special(settings)
    for number, token in sorted(_added_tokens(folder, settings).items()):
        known = vocabulary.get(token.content)
        # The library keeps ids of known tokens, and gives the next one to a new token.
        expected = size if known is None else known
        if number != expected:
            raise DataError(
                f"tokenizer {folder}: added token {token.content!r} has id {number}, and would get "
                f"{expected}; give a tokenizer.json"
            )
        if known is not None:
            continue
        if token.special or token.content in special:
            inner.add_special_tokens([token])
        else:
            inner.add_tokens([token])
        size += 1
    return inner


def _with_special(
    inner: tokenizers.Tokenizer, settings: Mapping[str, Any], usual: Iterable[str]
) -> tokenizers.Tokenizer:
    """Returns a tokenizer with its special tokens marked."""
    vocabulary = inner.get_vocab(with_added_tokens=False)
    found = vocabulary.keys() & (_special(settings) | set(usual))
    inner.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in sorted(found, key=vocabulary.get)]
    )
    return inner


def _special(settings: Mapping[str, Any]) -> set[str]:
    """Returns the special tokens in the settings."""
    named = [settings[name] for name in _SPECIAL_NAMES if settings.get(name)]
    for name in ("additional_special_tokens", "extra_special_tokens"):
        more = settings.get(name) or []
        named += more.values() if isinstance(more, dict) else more
    for token in (settings.get("added_tokens_decoder") or {}).values():
        named += [token] if token.get("special") else []
    return {_content(token) for token in named}


def _added_tokens(folder: Path, settings: Mapping[str, Any]) -> dict[int, AddedToken]:
    """Returns the added tokens of a folder by id."""
    listed = _read_json(folder / "added_tokens.json")
    found: dict[int, AddedToken] = {}
    try:
        for content, number in listed.items():
            found[int(number)] = AddedToken(content, normalized=False)
        for number, token in (settings.get("added_tokens_decoder") or {}).items():
            flags = {flag: bool(token.get(flag, False)) for flag in _FLAGS}
            found[int(number)] = AddedToken(token["content"], **flags)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"tokenizer {folder}: the list of added tokens is not readable: {error!r}; give a "
            "tokenizer.json"
        ) from None
    return found
