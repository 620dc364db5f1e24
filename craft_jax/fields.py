"""Assigns values to the fields of a config by name, and collects every mistake."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from craft_jax.messages import nearest, one_line, shown

# What users of other frameworks type, for "did you mean".
_ALIASES = {
    "n_layer": "num_layers",
    "n_layers": "num_layers",
    "n_head": "num_heads",
    "n_heads": "num_heads",
    "n_embd": "d_model",
    "hidden_size": "d_model",
    "block_size": "max_seq_len",
    "context_length": "max_seq_len",
    "lr": "learning_rate",
    "min_lr": "min_learning_rate",
    "max_iters": "num_steps",
    "max_steps": "num_steps",
    "warmup_iters": "warmup_steps",
    "lr_decay_iters": "decay_steps",
    "grad_clip": "clip_norm",
    "eval_interval": "eval_every",
    "log_interval": "log_every",
    "dtype": "precision",
    "gradient_accumulation_steps": "accumulate",
}


class Override(NamedTuple):
    """A `--config.section.field=value` of the command line.

    Attributes:
      field: `section.field`.
      text: the text after the equals sign.
    """

    field: str
    text: str


class Assignments:
    """Values by field, and one line for each mistake among them.

    Args:
      types: the type of each field by its full name, `section.field`, or `field` outside of one.

    Attributes:
      types: as given.
      values: by full name.
      bad_fields: the fields that have mistakes.
      mistakes: the lines.
    """

    def __init__(self, types: Mapping[str, Any]):
        self.types = types
        self.values: dict[str, Any] = {}
        self.bad_fields: set[str] = set()
        self.mistakes: list[str] = []

    def add_mistakes(self, field: str, *problems: str) -> None:
        """Notes what is wrong with a field; an empty name marks several fields."""
        if problems and field:
            self.bad_fields.add(field)
        self.mistakes += map(one_line, problems)

    def assign(self, field: str, raw: Any, read: Callable[[Any, Any], Any], source: str) -> None:
        """Reads a value as the type of its field, or notes why it cannot be.

        Args:
          field: the full name, which need not exist.
          raw: the value, as `read` takes it.
          read: `values.coerce` or `values.parse`.
          source: where the value comes from, for messages.
        """
        if field not in self.types:
            self.add_mistakes(field, f"{source}: {_unknown(field, self.types)}")
            return
        try:
            self.values[field] = read(raw, self.types[field])
        except ValueError as error:
            self.add_mistakes(field, f"{field}={shown(raw)} {error} (in {source})")

    def section(self, name: str) -> dict[str, Any]:
        """Returns the values of the fields of one section, by their short names."""
        start = f"{name}."
        return {k.removeprefix(start): v for k, v in self.values.items() if k.startswith(start)}


def _unknown(field: str, types: Mapping[str, Any]) -> str:
    """Returns why there is no such field, with a hint."""
    if not field.strip("."):
        return "a field has no name; write `config.SECTION.FIELD=VALUE`"
    sections: dict[str, list[str]] = {}
    for full_name in types:
        section, dot, name = full_name.rpartition(".")
        if dot:
            sections.setdefault(section, []).append(name)
    full_names = _by_short_name(types)
    section, dot, name = field.rpartition(".")
    if not dot:
        section, name = name, ""
    if section not in sections:
        similar = nearest(section, sections)
        close = f"{similar}.{name}" if similar and name else full_names.get(_alias(section))
        hint = f"the sections are {', '.join(sections)}"
    elif name:
        own = sections[section]
        alias = _alias(name)
        close = alias if alias in own else nearest(name, own) or full_names.get(alias)
        hint = f"{section} has {', '.join(own)}"
    else:
        return f"{section} is a section: name one of its fields, {', '.join(sections[section])}"
    return f"{field} is no field; {f'did you mean `{close}`?' if close else hint}"


def find_field(name: str, types: Mapping[str, Any], *, is_exact: bool) -> str | None:
    """Returns the full name of the field that a short name, or one of another framework, means.

    Args:
      name: with or without a section.
      types: of each field by its full name.
      is_exact: whether to leave out names that are only similar.
    """
    if name in types:
        return name
    full_names, short = _by_short_name(types), _alias(name.rpartition(".")[2])
    if short in full_names or is_exact:
        return full_names.get(short)
    return full_names.get(nearest(short, full_names) or "")


def _by_short_name(types: Mapping[str, Any]) -> dict[str, str]:
    """Returns full names; where several sections have a field, the one of the first."""
    return {name.rpartition(".")[2]: name for name in reversed(types)}


def _alias(name: str) -> str:
    return _ALIASES.get(name, name)
