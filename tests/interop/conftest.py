"""Fixtures of the tests of interop."""

import importlib.util
import sys
import warnings

import pytest

from interop.commands import torch_process


@pytest.fixture(autouse=True)
def torch_in_this_process(request, monkeypatch):
    """Runs the torch worker in this process: a new one takes seconds to import torch.

    A test marked `own_process` has the process.
    """
    if importlib.util.find_spec("torch") is None or request.node.get_closest_marker("own_process"):
        return

    def run_worker(folder):
        from interop.pytorch import worker

        path, writes = list(sys.path), sys.dont_write_bytecode
        sys.modules.pop("modeling_craft", None)  # That of another folder.
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                worker.main(folder)
        except Exception as error:
            return f"{type(error).__name__}: {error}".splitlines()[-1]
        finally:
            sys.path[:], sys.dont_write_bytecode = path, writes
        return None

    monkeypatch.setattr(torch_process, "run_worker", run_worker)
