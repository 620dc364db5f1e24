"""The shape of the project: which module may import which, and how.

docs/architecture.md says why. A failure here means that the code has drifted from that page.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Low to high: a module may import those on its own line and on the lines above.
LAYERS = [
    ["errors", "schema", "values", "plugins", "faults", "durable"],
    ["losses", "metrics", "manifests", "outputs", "locks", "data"],
    ["models"],
    [
        "precision",
        "optim",
        "sharding",
        "runtime",
        "watchdog",
        "memory",
        "generation",
        "image_generation",
        "profiling",
        "rendezvous",
        "processes",
        "array_files",
        "checkpointing",
    ],
    ["training"],
    ["config"],
    ["runs"],
    ["commands"],
    ["main", "launch"],
]
_RANK = {room: rank for rank, rooms in enumerate(LAYERS) for room in rooms}

# What a module may never import, whatever its layer: (who, what, except where).
FORBIDDEN = [
    (r"craft_jax\b", r"interop\b", ()),
    (r"craft_jax\.data\b", r"(jax|flax)\b", ()),
    (r"craft_jax\.training\.callbacks", r"craft_jax\.training\.trainer", ()),
    (
        r"(craft_jax|interop|configs)\b",
        r"(ml_collections|absl\.flags)\b",
        ("craft_jax.main", "craft_jax.config", "interop.__main__", "configs."),
    ),
    (r"craft_jax\b", r"(torch|tensorflow|transformers|tensorboardX)\b", ()),
    (r"configs\b", r"craft_jax\b", ()),
    (r"(craft_jax|interop|configs)\b", r"(tests|scripts)\b", ()),
    (r"interop\b", r"craft_jax\.(main|commands|training)\b", ()),
    # Tables and engine are numpy; JAX lives in `live` and `imports`, torch below `pytorch`.
    (
        r"interop\b",
        r"(jax|flax|optax|orbax|craft_jax\.(models|runs|config|checkpointing))\b",
        ("interop.sources.live", "interop.commands.import_", "interop.sources.state_dicts"),
    ),
    (r"interop\b", r"(torch|transformers)\b", ("interop.pytorch",)),
    (r"interop\b", r"safetensors\b", ()),
    (r"interop\.(ops|mapping|spec|leaves|targets)", r"interop\.(files|source|export)", ()),
]

# Run where only torch is, or only sometimes: imports inside functions are theirs to make.
OPTIONAL = ("interop.pytorch.worker", "interop.pytorch.verify_folder")


def modules() -> list[Path]:
    return sorted(
        path
        for folder in ("craft_jax", "interop", "configs")
        for path in (ROOT / folder).rglob("*.py")
    )


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(source: str) -> list[str]:
    """Returns the full name of everything that a module imports, wherever it stands."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def room(name: str) -> str | None:
    """Returns the room of `craft_jax` that a module belongs to."""
    parts = name.split(".")
    return parts[1] if parts[0] == "craft_jax" and len(parts) > 1 else None


def violations(name: str, source: str) -> list[str]:
    """Returns one line for each import that must not be there."""
    found = []
    for imported in imports(source):
        for who, what, exceptions in FORBIDDEN:
            allowed = name.startswith(tuple(exceptions)) if exceptions else False
            if re.match(who, name) and re.match(what, imported) and not allowed:
                found.append(f"{name} imports {imported}")
        own, other = room(name), room(imported)
        if own and other:
            if other not in _RANK:
                found.append(f"{name} imports {imported}, whose room is in no layer")
            elif _RANK[other] > _RANK[own]:
                found.append(f"{name} imports {imported}, which is above it")
    return found


def nested_imports(source: str) -> list[int]:
    """Returns the lines of imports that stand inside a function."""
    return [
        inner.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        for inner in ast.walk(node)
        if isinstance(inner, (ast.Import, ast.ImportFrom))
    ]


@pytest.mark.parametrize("path", modules(), ids=module_name)
def test_imports_go_down(path):
    assert violations(module_name(path), path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", modules(), ids=module_name)
def test_imports_stand_at_the_top(path):
    if module_name(path) in OPTIONAL:
        return
    assert nested_imports(path.read_text(encoding="utf-8")) == []


def test_every_module_has_a_layer():
    rooms = {room(module_name(path)) for path in modules()} - {None}
    assert rooms <= set(_RANK)


def test_the_package_itself_is_empty():
    assert (ROOT / "craft_jax/__init__.py").read_text(encoding="utf-8") == ""


def test_no_module_without_a_concept():
    names = {path.stem for path in modules()}
    assert not names & {"util", "utils", "common", "helper", "helpers", "misc"}


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("craft_jax.models.gpt", "import craft_jax.training"),
        ("craft_jax.models.gpt", "from craft_jax import training"),
        ("craft_jax.models.gpt", "from craft_jax.training.optim import OptimConfig"),
        ("craft_jax.data.text", "import jax.numpy as jnp"),
        ("craft_jax.training.step", "import torch"),
        ("craft_jax.training.callbacks", "from craft_jax.training.trainer import Trainer"),
        ("craft_jax.training.optim", "from ml_collections import ConfigDict"),
        ("craft_jax.runs", "import interop"),
        ("interop.targets.registry.gpt2", "import torch"),
        ("interop.mapping.table", "import jax.numpy as jnp"),
        ("interop.commands.export", "from craft_jax.models import base"),
        ("interop.files.safetensors", "from safetensors.numpy import save_file"),
        ("configs.gpt", "from craft_jax.models.gpt import GPTConfig"),
    ],
)
def test_this_test_sees_what_it_must_see(name, line):
    path = ROOT / (name.replace(".", "/") + ".py")
    assert violations(name, f"{path.read_text(encoding='utf-8')}\n{line}\n")
