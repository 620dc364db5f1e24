"""Records to text: the fields that are read, and the parts that count in the loss.

Only markup may be encoded as special tokens, so that no text can spell one.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from craft_jax.data.sources.documents import Document, pieces
from craft_jax.errors import DataError

CHATML = "<|im_start|>{role}\n{content}<|im_end|>\n"
"""The message template of many chat models."""

_SPECIAL = re.compile(r"<\|[^|<>\s]+\|>|</?s>|\[/?[A-Z]+\]")
_ROLE = re.compile(r"[\w-]{1,64}")


class TextSpan(NamedTuple):
    """Text of a document with one value of the loss mask.

    Attributes:
      text: the text.
      in_loss: whether its tokens count in the loss.
      is_markup: whether it comes from a template.
      continues: whether it continues the text of the span before it.
    """

    text: str
    in_loss: bool = True
    is_markup: bool = False
    continues: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """The fields of a record that are read, and how; running text ignores them.

    Attributes:
      text_field: the field with the text that counts in the loss.
      prompt_field: the field with text before it, masked out; None for none.
      messages_field: the field with a list of `role` and `content`, in place of the two above; None
        for none.
      template: the text of each message, with `{role}` and `{content}` in it.
      learned_roles: the roles whose messages count in the loss.
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
        """The special tokens of the template, such as `<|im_start|>`, if it is used."""
        return sorted(set(_SPECIAL.findall(self.template))) if self.messages_field else []

    def spans(self, document: Document) -> Iterator[TextSpan]:
        """Yields the text of a document in order, in pieces.

        Raises:
          DataError: a record lacks a field, or its value is not text.
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
            yield from _cut_up(document.read(), continues=not document.starts)
        elif self.messages_field:
            yield from self._messages(document)
        else:
            if self.prompt_field:
                prompt = self._text(document, document.fields, self.prompt_field, "prompt_field")
                yield from _cut_up((prompt,), in_loss=False)
            text = self._text(document, document.fields, self.text_field, "text_field")
            yield from _cut_up((text,))

    def _messages(self, document: Document) -> Iterator[TextSpan]:
        assert document.fields is not None and self.messages_field
        messages = document.fields.get(self.messages_field)
        if not isinstance(messages, list) or not all(isinstance(m, Mapping) for m in messages):
            raise DataError(
                f"{document.where()} has no list of messages in the field {self.messages_field!r} "
                f"{_have(document.fields)}; set data.messages_field"
            )
        before, after = self.template.split("{content}")
        for number, message in enumerate(messages):
            label = f"message {number} of {self.messages_field!r}"
            role = self._text(document, message, "role", None, label)
            content = self._text(document, message, "content", None, label)
            if not _ROLE.fullmatch(role):
                raise DataError(
                    f"{document.where()}: {label} has the role {role!r}; a role is a word such as "
                    "user or assistant"
                )
            in_loss = role in self.learned_roles
            if before:
                yield TextSpan(before.replace("{role}", role), in_loss=False, is_markup=True)
            yield from _cut_up((content,), in_loss)
            if after:
                yield TextSpan(after.replace("{role}", role), in_loss, is_markup=True)

    @staticmethod
    def _text(
        document: Document,
        fields: Mapping[str, Any],
        name: str,
        setting: str | None,
        label: str | None = None,
    ) -> str:
        text = fields.get(name)
        here = f"{document.where()}{f': {label}' if label else ''}"
        if not isinstance(text, str):
            if name in fields:
                kind = type(text).__name__
                raise DataError(
                    f"{here} has no text in the field {name!r} but a {kind}; correct or remove it"
                )
            remedy = f"set data.{setting}" if setting else "correct or remove it"
            raise DataError(f"{here} has no text in the field {name!r} {_have(fields)}; {remedy}")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise DataError(
                f"{here} has an unpaired surrogate in the field {name!r}; remove it"
            ) from None
        return text


def _cut_up(
    chunks: Iterable[str], in_loss: bool = True, continues: bool = False
) -> Iterator[TextSpan]:
    for piece in pieces(chunks):
        yield TextSpan(piece, in_loss, continues=continues)
        continues = True


def _have(fields: Mapping[str, Any]) -> str:
    names = ", ".join(fields) or "nothing"
    return f"(it has: {''.join(c if c.isprintable() else '?' for c in names)})"
