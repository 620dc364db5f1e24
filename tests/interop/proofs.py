"""The script of exported folders, run here: a process of its own takes seconds to import torch."""

import contextlib
import io
import os
import runpy
import subprocess
import sys
import warnings
from pathlib import Path


def prove(folder: Path) -> subprocess.CompletedProcess:
    """Runs a folder's `verify.py` in this process, and says how it went."""
    out, err = io.StringIO(), io.StringIO()
    before = list(sys.path), sys.dont_write_bytecode, dict(os.environ)
    sys.modules.pop("modeling_craft", None)  # That of another folder.
    code = 0
    try:
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            runpy.run_path(str(folder / "verify.py"), run_name="__main__")
    except SystemExit as stop:
        # As the interpreter does it.
        code = stop.code if isinstance(stop.code, int) else 1
        err.write(f"{stop.code}\n")
    finally:
        sys.path[:], sys.dont_write_bytecode, environment = before
        os.environ.clear()
        os.environ.update(environment)
        sys.modules.pop("modeling_craft", None)
    return subprocess.CompletedProcess(["verify.py"], code, out.getvalue(), err.getvalue())


def prove_alone(folder: Path) -> subprocess.CompletedProcess:
    """Runs a folder's `verify.py` as its users do, without what is installed beside torch."""
    command = [sys.executable, "-I", str(folder / "verify.py")]
    return subprocess.run(command, capture_output=True, text=True, check=False)
