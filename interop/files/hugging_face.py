"""The files of a Hugging Face folder that are not weights: configs and tokenizer.

They are written so that transformers 4.49 and 5.x read them alike, and without importing either.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from craft_jax import outputs
from craft_jax.data.tokenizers import Tokenizer
from craft_jax.errors import CraftError
from interop.errors import CorruptFileError
from interop.mapping.tensors import Abstract

CONFIG, GENERATION, TOKENIZER = "config.json", "generation_config.json", "tokenizer.json"
_TOKENIZER_CONFIG = "tokenizer_config.json"


def config(
    architecture: Mapping[str, Any], tensors: Mapping[str, Abstract], tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """Returns `config.json`: the architecture, its dtype under both names, and the special ids.

    The dtype is one that holds every tensor, since transformers converts all of them to it.
    """
    end_id = tokenizer.end_id if tokenizer else None
    dtype = common_dtype(tensors)
    special = {"bos_token_id": end_id, "eos_token_id": end_id, "pad_token_id": None}
    return {**architecture, **special, "torch_dtype": dtype, "dtype": dtype}


def common_dtype(tensors: Mapping[str, Abstract]) -> str:
    """Returns the name of the smallest dtype that holds the values of all tensors."""
    names = {tensor.dtype.name for tensor in tensors.values()}
    if len(names) == 1:
        return names.pop()
    return "float64" if "float64" in names else "float32"


def generation_config(tokenizer: Tokenizer | None, vocab_size: int) -> dict[str, Any]:
    """Returns `generation_config.json`: ids that end, pad, and must never be made."""
    end_id = tokenizer.end_id if tokenizer else None
    found: dict[str, Any] = {
        "bos_token_id": end_id,
        "eos_token_id": end_id,
        "pad_token_id": end_id,
    }
    if tokenizer and tokenizer.vocab_size < vocab_size:
        found["suppress_tokens"] = list(range(tokenizer.vocab_size, vocab_size))
    return found


def write_tokenizer(folder: Path, tokenizer: Tokenizer, max_seq_len: int) -> None:
    """Writes the files of a tokenizer.

    Text never turns into a special token by spelling one, there as here.
    """
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
        "model_max_length": max_seq_len,
    }
    if tokenizer.end_id is not None:
        token = tokenizer.token(tokenizer.end_id)
        described |= {"bos_token": token, "eos_token": token}
    outputs.write_text(folder / TOKENIZER, tokenizer.json)
    outputs.write_json(folder / _TOKENIZER_CONFIG, described)


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """Reads the tokenizer of a folder: `tokenizer.json`, or GPT-2's `vocab.json` and `merges.txt`.

    Raises:
      CorruptFileError: it is there and cannot be read.
    """
    try:
        if (folder / TOKENIZER).is_file():
            return Tokenizer.load(folder / TOKENIZER)
        vocab, merges = folder / "vocab.json", folder / "merges.txt"
        if vocab.is_file() and merges.is_file():
            inner = tokenizers.Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
            inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            inner.decoder = decoders.ByteLevel()
            if inner.token_to_id("<|endoftext|>") is not None:
                inner.add_special_tokens(["<|endoftext|>"])
            return Tokenizer(inner)
    except CraftError as error:
        raise CorruptFileError(str(error)) from error
    except Exception as error:  # The tokenizers library raises bare Exception.
        raise CorruptFileError(f"{folder}: its tokenizer cannot be read: {error}") from error
    return None


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
      CorruptFileError: it is not one.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CorruptFileError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise CorruptFileError(f"{path} holds {type(value).__name__}, not an object")
    return value
