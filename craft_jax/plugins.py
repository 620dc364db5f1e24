"""Classes of the user's own, named in a config as `path/file.py:Class` or `module:Class`."""

import importlib
import importlib.util
import sys
from pathlib import Path

from craft_jax.errors import ConfigError


def is_reference(name: str) -> bool:
    """Returns whether a config value names a class of the user's own."""
    return ":" in name


def absolute(reference: str) -> str:
    """Makes the path in `path/file.py:Class` absolute, so that it can be opened from anywhere."""
    place, _, name = reference.rpartition(":")
    return f"{Path(place).expanduser().resolve()}:{name}" if place.endswith(".py") else reference


def load(reference: str, field: str, base: type | tuple[type, ...]) -> type:
    """Imports a class.

    Args:
      reference: `path/file.py:Class` or `module:Class`.
      field: the config field that names it, for messages.
      base: what it must derive from; one of several.

    Raises:
      ConfigError: no such file, module or class, the file fails, or the base is another.
    """
    place, _, name = reference.rpartition(":")
    here = f"{field}={reference}"
    try:
        module = _run_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except FileNotFoundError:
        raise ConfigError(f"{here}: no such file; give its path from {Path.cwd()}") from None
    except Exception as error:
        raise ConfigError(f"{here}: importing it fails: {type(error).__name__}: {error}") from error
    found = getattr(module, name, None)
    if not (isinstance(found, type) and issubclass(found, base)):
        own = [k for k, v in vars(module).items() if isinstance(v, type) and issubclass(v, base)]
        bases = base if isinstance(base, tuple) else (base,)
        have = ", ".join(k for k in own if vars(module)[k] not in bases) or "none"
        wanted = " or ".join(f"{b.__module__}.{b.__name__}" for b in bases)
        raise ConfigError(
            f"{here}: no class {name} there that derives from {wanted}; the file has: {have}"
        )
    return found


def _run_file(path: Path) -> object:
    path = path.expanduser().resolve()
    name = f"craft_jax_plugin_{path.stem}_{abs(hash(str(path))):x}"
    if name in sys.modules:
        return sys.modules[name]
    if not path.is_file():
        raise FileNotFoundError(path)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
