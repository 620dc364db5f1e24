"""The shape of the project: which module may import which, and how.

docs/architecture.md says why. A failure here means that the code has drifted from that page.
"""

import ast
import collections
import graphlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Low to high: a module may import those of its own line and of the lines above it. A name stands
# for all below it that no longer name covers.
LAYERS = [
    "errors messages schema values fields plugins runtime checkpoint.atomic checkpoint.manifest",
    "outputs checkpoint.listing checkpoint.lock data parallel models.losses models.numerics",
    "models",
    "checkpoint generation training.optim training.precision training.metrics training.state",
    "training.callbacks checkpoint.manager",
    "training",
    "config_file",
    "config",
    "runs",
    "checkpoint.resume generation.previews",
    "commands",
    "unknown_flags",
    "main launch",
]
_RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names.split()}

# Words of the layout, which mean the same wherever they occur.
SHARED_NAMES = set("__init__ base files runs sampling settings tensors tokenizer".split())
SHARED_NAMES |= {"nanogpt", "tfds"}  # A format, read in one module and computed in another.

# What a module may never import, whatever its layer: (who, what, except where).
FORBIDDEN = [
    (r"craft_jax\b", r"interop\b", ()),
    (r"craft_jax\.data\b", r"(jax|flax)\b", ()),
    (r"craft_jax\.training\.callbacks", r"craft_jax\.training\.trainer", ()),
    # The registry alone names the classes of models.
    (
        r"(craft_jax|interop)\.(?!models)",
        r"craft_jax\.models\.(gpt|transformer|seq2seq|flow)\b",
        (),
    ),
    (
        r"(craft_jax|interop|configs)\b",
        r"(ml_collections|absl\.flags)\b",
        ("craft_jax.main", "craft_jax.config_file", "interop.__main__", "configs."),
    ),
    (r"craft_jax\b", r"(torch|tensorflow|transformers|tensorboardX)\b", ()),
    (r"configs\b", r"craft_jax\b", ()),
    (r"(craft_jax|interop|configs)\b", r"(tests|scripts)\b", ()),
    (r"interop\b", r"craft_jax\.(main|commands|training)\b", ()),
    # Tables and engine are numpy; JAX is used in `live` and `import_`, torch below `pytorch`.
    (
        r"interop\b",
        r"(jax|flax|optax|orbax|craft_jax\.(models|runs|config|checkpointing))\b",
        ("interop.sources.live", "interop.commands.import_", "interop.sources.state_dicts"),
    ),
    (r"interop\b", r"(torch|transformers)\b", ("interop.pytorch", "interop.craft.torch_models")),
    (r"interop\b", r"safetensors\b", ()),
    (r"interop\.(mapping|targets)", r"interop\.(files|sources|commands)", ()),
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


def rank(name: str) -> int | None:
    """Returns the layer of a name of `craft_jax`; None for what is not in it, or in no layer."""
    parts = name.removeprefix("craft_jax.").split(".") if name.startswith("craft_jax.") else []
    for length in range(len(parts), 0, -1):
        if (found := _RANK.get(".".join(parts[:length]))) is not None:
            return found
    return None


def violations(name: str, source: str) -> list[str]:
    """Returns one line for each import that must not be there."""
    found = []
    for imported in imports(source):
        for who, what, exceptions in FORBIDDEN:
            allowed = name.startswith(tuple(exceptions)) if exceptions else False
            if re.match(who, name) and re.match(what, imported) and not allowed:
                found.append(f"{name} imports {imported}")
        own, other = rank(name), rank(imported)
        if own is not None and other is not None and other > own:
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


def test_imports_go_down():
    found = [v for p in modules() for v in violations(module_name(p), p.read_text("utf-8"))]
    assert found == []


def test_imports_are_at_the_top():
    found = {
        module_name(path): lines
        for path in modules()
        if module_name(path) not in OPTIONAL and (lines := nested_imports(path.read_text("utf-8")))
    }
    assert found == {}


def test_every_module_has_a_layer():
    names = {module_name(path) for path in modules()} - {"craft_jax"}
    packages = {name for name in names if any(other.startswith(f"{name}.") for other in names)}
    own = {name for name in names - packages if name.startswith("craft_jax")}
    assert {name for name in own if rank(name) is None} == set()


def test_no_import_cycles():
    """No two modules need each other, however far around."""
    names = {module_name(path): path for path in modules()}
    needs = {}
    for name, path in names.items():
        found = set()
        for full in imports(path.read_text("utf-8")):
            while full and full not in names:
                full = full.rpartition(".")[0]
            found.add(full)
        needs[name] = found - {"", name, "craft_jax", "interop"}
    # `TopologicalSorter` raises a CycleError that names the modules.
    tuple(graphlib.TopologicalSorter(needs).static_order())


def test_the_kernels_alone_ask_for_the_backend():
    asks = re.compile(r"default_backend|platform_dependent")
    found = {
        name
        for path in modules()
        if not (name := module_name(path)).startswith("craft_jax.models.kernels")
        and asks.search(path.read_text("utf-8"))
    }
    assert not found


def test_one_name_has_one_meaning():
    """A module name occurs once in `craft_jax` and once in `interop`, but for words of layouts."""
    count = collections.Counter((path.relative_to(ROOT).parts[0], path.stem) for path in modules())
    twice = {name for (_, name), number in count.items() if number > 1}
    assert twice <= SHARED_NAMES


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
        ("interop.targets.gpt2", "import torch"),
        ("interop.mapping.table", "import jax.numpy as jnp"),
        ("interop.commands.export", "from craft_jax.models import base"),
        ("interop.files.safetensors", "from safetensors.numpy import save_file"),
        ("configs.gpt", "from craft_jax.models.gpt import GPTConfig"),
    ],
)
def test_this_test_sees_what_it_must_see(name, line):
    path = ROOT / (name.replace(".", "/") + ".py")
    assert violations(name, f"{path.read_text(encoding='utf-8')}\n{line}\n")
