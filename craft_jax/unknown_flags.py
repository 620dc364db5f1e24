"""Answers to words of a command line that no command knows: the flag that was probably meant."""

import importlib
import shlex
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from craft_jax.messages import nearest

_DEVICES = ("device", "devices", "accelerator", "platform", "gpu", "cpu", "tpu", "cuda")


def explain(words: Sequence[str], command: str, options: Mapping[str, Collection[str]]) -> str:
    """Returns a line for each unknown word, with the right one if it can be told.

    Args:
      words: that the parser of the command did not take.
      command: the name of the command.
      options: of every command, without dashes.
    """
    lines, waiting = [], list(words)
    while waiting:
        word = waiting.pop(0)
        name, equals, value = word.lstrip("-").partition("=")
        if word.startswith("-") and not equals and waiting and not waiting[0].startswith("-"):
            value = waiting.pop(0)
        answer = _answer(word, name.replace("-", "_"), value, command, options)
        lines.append(f"{word!r} is no argument of {command}{answer}")
    return "\n".join([*lines, f"(python -m craft_jax.main {command} --help)"])


def _answer(
    word: str, name: str, value: str, command: str, options: Mapping[str, Collection[str]]
) -> str:
    if not name:
        return "; write a flag and its value as one word, such as --run=NAME"
    assigned = f"={shlex.quote(value)}" if value else "=VALUE"
    if name in options[command]:
        return f"; did you mean --{name}{assigned}?"
    if not word.startswith("-"):
        is_file = ".py" in Path(word.partition(":")[0]).suffix
        return f"; did you mean --{'config' if is_file else 'run'}={shlex.quote(word)}?"
    if name in _DEVICES:
        return "; JAX chooses the device: set JAX_PLATFORMS=cpu (cuda, tpu) in the environment"
    if name == "resume":
        return "; a run that exists is continued: --run=NAME, or --run=latest"
    if field := _find_field(name, is_exact=True):
        return f"; did you mean --config.{field}{assigned}?"
    if commands := [other for other, known in options.items() if name in known]:
        return f"; it is a flag of {', '.join(commands)}"
    longer = [option for option in options[command] if len(name) > 2 and option.startswith(name)]
    if close := next(iter(longer), None) or nearest(name, options[command]):
        return f"; did you mean --{close}{assigned}?"
    if field := _find_field(name, is_exact=False):
        return f"; did you mean --config.{field}{assigned}?"
    return ""


def _find_field(name: str, *, is_exact: bool) -> str | None:
    # Imports JAX, which a command line without mistakes has no use for here.
    config = importlib.import_module("craft_jax.config")
    return config.find_field(name.removeprefix("config."), is_exact=is_exact)
