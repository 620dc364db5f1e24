"""Carries models between craft_jax and PyTorch, bit for bit, and proves it.

The functions below are all there is to call; `python -m interop` has the same as commands. A
function's module is imported when it is first used, so that an export needs neither JAX nor torch.

    import interop

    interop.save_pretrained("outputs/models/my-run", "out/gpt2", target="hf")
    model = interop.from_pretrained("out/gpt2")
"""

import importlib
from typing import Any

_HOMES = {
    "save_pretrained": "interop.commands.export",
    "export_checkpoint": "interop.commands.export",
    "plan": "interop.commands.plan",
    "import_checkpoint": "interop.commands.import_",
    "from_pretrained": "interop.sources.state_dicts",
    "to_state_dict": "interop.sources.state_dicts",
    "from_state_dict": "interop.sources.state_dicts",
    "targets_for": "interop.commands.targets",
    "explain": "interop.commands.targets",
    "inspect": "interop.commands.inspect",
    "diff": "interop.commands.diff",
    "verify": "interop.commands.verify",
    "ModelSpec": "interop.mapping.spec",
    "Options": "interop.sources.source",
    "InteropError": "interop.errors",
}

_MODULES = {"source": "interop.sources.opening", "live": "interop.sources.live"}
"""Modules under the names that they had in release 0.1."""

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES | _MODULES:
        raise AttributeError(f"module 'interop' has no attribute {name!r}")
    if name in _MODULES:
        value: Any = importlib.import_module(_MODULES[name])
    else:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
