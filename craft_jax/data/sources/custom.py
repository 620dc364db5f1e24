"""A source of texts or records from a class of the user's own."""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from craft_jax import plugins
from craft_jax.data.base import BaseDataset
from craft_jax.data.sources.documents import PART_BYTES, Document, Part, Source, one_line
from craft_jax.errors import ConfigError, CraftError, DataError

_PROBED = 100


class OwnPart(Part):
    """Some examples of a class.

    Args:
      reference, config: see `OwnSource`.
      numbers: of the examples.
      num_bytes: their approximate size.
    """

    def __init__(self, reference: str, config: Any, numbers: range, num_bytes: int):
        self.reference, self.config = reference, config
        self.numbers, self.num_bytes = numbers, num_bytes

    def documents(self) -> Iterator[Document]:
        examples = build(self.reference, self.config)
        yield from _documents(self.reference, examples, self.numbers, self.config.text_field)


class OwnSource(Source):
    """All examples of a class: texts, or dicts like the lines of a `.jsonl` file.

    Args:
      reference: the class, `path/file.py:Class` or `module:Class`.
      config: the `data` section of the config, its constructor's argument.

    Raises:
      ConfigError: it cannot be built.
    """

    def __init__(self, reference: str, config: Any):
        self._reference, self._config = reference, config
        self.name, self.origin = reference.rpartition(":")[2], f"data.source={reference}"
        self._examples = build(reference, config)

    def digest(self) -> str:
        digest = hashlib.sha256()
        for document in self._read(range(len(self._examples))):
            digest.update(_packed(document) + b"\0")
        return digest.hexdigest()

    def parts(self) -> list[Part]:
        count = len(self._examples)
        probed = range(0, count, max(1, count // _PROBED))
        sizes = [len(_packed(document)) for document in self._read(probed)]
        mean = max(1, sum(sizes) // max(1, len(sizes)))
        step = max(1, PART_BYTES // mean)
        spans = (range(first, min(first + step, count)) for first in range(0, count, step))
        return [OwnPart(self._reference, self._config, s, mean * len(s)) for s in spans]

    def _read(self, numbers: range) -> Iterator[Document]:
        yield from _documents(self._reference, self._examples, numbers, self._config.text_field)


def build(reference: str, config: Any) -> BaseDataset:
    """Builds the class of a source.

    Raises:
      ConfigError: the class cannot be used.
    """
    cls: Any = plugins.load(reference, "data.source", BaseDataset)
    try:
        return cls(config)
    except TypeError as error:
        raise ConfigError(f"data.source={reference} is built as Class(config): {error}") from error
    except CraftError:
        raise
    except Exception as error:
        raise DataError(
            f"data.source={reference}: its __init__ failed with {type(error).__name__}: "
            f"{one_line(error)}; correct it"
        ) from error


def _documents(
    reference: str, examples: BaseDataset, numbers: range, text_field: str
) -> Iterator[Document]:
    for number in numbers:
        place = f"data.source={reference}: example {number}"
        try:
            example = examples[number]
        except CraftError:
            raise
        except Exception as error:
            raise DataError(f"{place} failed with {type(error).__name__}: {error}") from error
        if isinstance(example, str):
            yield Document(place=place, fields={text_field: example})
        elif isinstance(example, dict):
            yield Document(place=place, fields=example)
        else:
            kind = type(example).__name__
            raise DataError(f"{place} is a {kind}; return a text, or a dict with one")


def _packed(document: Document) -> bytes:
    text = json.dumps(document.fields, sort_keys=True, default=str)
    return text.encode("utf-8", "surrogatepass")
