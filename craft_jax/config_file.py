"""Runs a config file, and names the file and line of an error in it."""

import contextlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from craft_jax.errors import ConfigError
from craft_jax.messages import one_line, shorten
from craft_jax.values import parse


def read_file(reference: str, overrides: Mapping[str, str] = {}) -> dict[str, Any]:
    """Runs `get_config` of a config file and returns its values as a dict.

    Args:
      reference: `path.py`, or `path.py:preset`; the preset is the argument of `get_config`.
      overrides: texts by field, for the fields that others refer to with `get_ref`.

    Raises:
      ConfigError: the file is missing, fails, or returns something else.
    """
    path, _, preset = reference.partition(":")
    here = f"`config={shorten(reference)}`"
    if os.path.isdir(path):
        raise ConfigError(f"{here}: this is a folder; name a Python file in it")
    if not os.path.isfile(path):
        raise ConfigError(f"{here}: no such file; the current folder is {Path.cwd()}")
    spec = importlib.util.spec_from_file_location("craft_jax_config", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{here}: not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
    try:
        spec.loader.exec_module(module)
        if not callable(vars(module).get("get_config")):
            raise ConfigError(f"{here}: the file has no function get_config()")
        config = module.get_config(preset) if preset else module.get_config()
        if not isinstance(config, ConfigDict):
            kind = type(config).__name__
            raise ConfigError(f"{here}: get_config() returned {kind}, not ConfigDict")
        _follow(config, overrides)
        return config.to_dict()
    except ConfigError:
        raise
    except SyntaxError as error:
        place = f"{error.filename or path} line {error.lineno or '?'}"
        raise ConfigError(one_line(f"{here}: {place}: {error.msg}")) from error
    except (Exception, SystemExit) as error:
        what = f"{type(error).__name__}: {error}"
        raise ConfigError(one_line(f"{here}: {_line_of(error, path)}{what}")) from error
    finally:
        sys.dont_write_bytecode = before


def _follow(config: ConfigDict, overrides: Mapping[str, str]) -> None:
    """Sets overridden fields, so that references to them take the new values.

    Values that cannot be read are left to the check of all fields.
    """
    for field, text in overrides.items():
        section, _, name = field.rpartition(".")
        part = config.get(section) if section else config
        if isinstance(part, ConfigDict) and name in part and part[name] is not None:
            with contextlib.suppress(ValueError), part.ignore_type():
                part[name] = parse(text, type(part[name]) | None)


def _line_of(error: BaseException, path: str) -> str:
    """Returns `line 3: ` for an error that passed through a file, else nothing."""
    own = os.path.realpath(path)
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if os.path.realpath(frame.filename) == own]
    return f"line {lines[-1]}: " if lines else ""
