"""Writes the tables of docs/configuration.md: python scripts/write_configuration.py.

What stands before the line `<!-- tables -->` is written by hand and kept.
"""

import dataclasses
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from craft_jax import config as configs
from craft_jax.models import MODELS, model_class

PAGE = ROOT / "docs/configuration.md"
MARK = "<!-- tables -->"


def tables() -> str:
    """Returns the tables of all sections; that of the model once for each registered model."""
    defaults = configs.from_values({})
    parts = []
    for section in configs.SECTIONS:
        parts.append(f"## {section}")
        if section != "model":
            parts.append(_table(type(getattr(defaults, section))))
            continue
        for name in MODELS:
            parts += [f"### model.name={name}", _table(model_class(name).Config)]
    return "\n\n".join(parts) + "\n"


def page() -> str:
    """Returns the page as it should be."""
    by_hand, _, _ = PAGE.read_text(encoding="utf-8").partition(MARK)
    return f"{by_hand}{MARK}\n\n{tables()}"


def _table(cls: type) -> str:
    """Returns a row for each field: type, default, meaning and bounds."""
    rows = [
        f"| `{field.name}` | {_type(field.type)} | {_shown(field.default)} | "
        f"{field.metadata['help']}{_bounds(field.metadata)} |"
        for field in dataclasses.fields(cls)
    ]
    return "\n".join(["| field | type | default | meaning |", "|---|---|---|---|", *rows])


def _type(kind: object) -> str:
    text = kind.__name__ if isinstance(kind, type) else str(kind)
    text = text.replace("typing.", "").replace("Literal[", "").replace("'", "")
    return text.removesuffix("]").replace("tuple[str, ...", "list of str").replace(" | ", " or ")


def _shown(value: object) -> str:
    return "" if value == () else f"`{value}`".replace("None", "none")


def _bounds(metadata: dict) -> str:
    words = {"minimum": "at least", "maximum": "at most", "above": "above", "below": "below"}
    shown = [f"{word} {metadata[name]:g}" for name, word in words.items() if name in metadata]
    return f" ({', '.join(shown)})" if shown else ""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
