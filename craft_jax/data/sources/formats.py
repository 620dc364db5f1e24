"""How a record becomes text: which of its fields are read, and which part of it is learned.

Documents flow in, stretches of text flow out, each marked as learned or not, and as markup or not:
markup alone may turn into special tokens, so that no text can spell one.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from craft_jax.data.sources.documents import Document, pieces
from craft_jax.errors import DataError

CHATML = "<|im_start|>{role}\n{content}<|im_end|>\n"
"""The template of messages that many chat models were trained with."""

_SPECIAL = re.compile(r"<\|[^|<>\s]+\|>|</?s>|\[/?[A-Z]+\]")
_ROLE = re.compile(r"[\w-]{1,64}")


class Stretch(NamedTuple):
    """Text of a document that is all learned, or all not.

    Attributes:
      text: what it says.
      is_learned: whether its tokens count in the loss.
      is_markup: whether it comes from a template.
      goes_on: whether it continues a text that was cut.
    """

    text: str
    is_learned: bool = True
    is_markup: bool = False
    goes_on: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """What to read of a record; running text needs none of it.

    Attributes:
      text_field: the field with the text that is learned.
      prompt_field: the field with text before it that is not learned; None for none.
      messages_field: the field with a list of `role` and `content`, in place of the two above; None
        for none.
      template: what is written for each message, with `{role}` and `{content}` in it.
      learned_roles: whose messages are learned.
    """

    text_field: str = "text"
    prompt_field: str | None = None
    messages_field: str | None = None
    template: str = CHATML
    learned_roles: tuple[str, ...] = ("assistant",)

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of records that are read."""
        if self.messages_field:
            return (self.messages_field,)
        return (*((self.prompt_field,) if self.prompt_field else ()), self.text_field)

    @property
    def special_tokens(self) -> list[str]:
        """The special tokens of the template, such as `<|im_start|>`, where it is used."""
        return sorted(set(_SPECIAL.findall(self.template))) if self.messages_field else []

    def stretches(self, document: Document) -> Iterator[Stretch]:
        """Yields the text of a document in order, long stretches in pieces.

        Raises:
          DataError: a record lacks a field, or has something else than text in it.
        """
        if document.fields is None:
            if self.messages_field or self.prompt_field:
                name = "messages_field" if self.messages_field else "prompt_field"
                raise DataError(
                    f"{document.where()} is running text, and data.{name}="
                    f"{getattr(self, name)} names a field of records; leave it out, or use .jsonl, "
                    ".parquet or a dataset"
                )
            assert document.read is not None
            yield from _cut_up(document.read(), goes_on=not document.starts)
        elif self.messages_field:
            yield from self._messages(document)
        else:
            if self.prompt_field:
                prompt = self._text(document, document.fields, self.prompt_field, "prompt_field")
                yield from _cut_up((prompt,), is_learned=False)
            text = self._text(document, document.fields, self.text_field, "text_field")
            yield from _cut_up((text,))

    def _messages(self, document: Document) -> Iterator[Stretch]:
        assert document.fields is not None and self.messages_field
        messages = document.fields.get(self.messages_field)
        if not isinstance(messages, list) or not all(isinstance(m, Mapping) for m in messages):
            raise DataError(
                f"{document.where()} has no list of messages in the field {self.messages_field!r} "
                f"{_have(document.fields)}; set data.messages_field"
            )
        before, after = self.template.split("{content}")
        for number, message in enumerate(messages):
            named = f"message {number} of {self.messages_field!r}"
            role = self._text(document, message, "role", None, named)
            content = self._text(document, message, "content", None, named)
            if not _ROLE.fullmatch(role):
                raise DataError(
                    f"{document.where()}: {named} has the role {role!r}; a role is a word such as "
                    "user or assistant"
                )
            is_learned = role in self.learned_roles
            if before:
                yield Stretch(before.replace("{role}", role), is_learned=False, is_markup=True)
            yield from _cut_up((content,), is_learned)
            if after:
                yield Stretch(after.replace("{role}", role), is_learned, is_markup=True)

    @staticmethod
    def _text(
        document: Document,
        fields: Mapping[str, Any],
        name: str,
        setting: str | None,
        named: str | None = None,
    ) -> str:
        text = fields.get(name)
        here = f"{document.where()}{f': {named}' if named else ''}"
        if not isinstance(text, str):
            if name in fields:
                kind = type(text).__name__
                raise DataError(
                    f"{here} has no text in the field {name!r} but a {kind}; mend or remove it"
                )
            remedy = f"set data.{setting}" if setting else "mend or remove it"
            raise DataError(f"{here} has no text in the field {name!r} {_have(fields)}; {remedy}")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise DataError(
                f"{here} has half a character in the field {name!r}; mend or remove it"
            ) from None
        return text


def _cut_up(
    chunks: Iterable[str], is_learned: bool = True, goes_on: bool = False
) -> Iterator[Stretch]:
    for piece in pieces(chunks):
        yield Stretch(piece, is_learned, goes_on=goes_on)
        goes_on = True


def _have(fields: Mapping[str, Any]) -> str:
    names = ", ".join(fields) or "nothing"
    return f"(it has: {''.join(c if c.isprintable() else '?' for c in names)})"
