"""Fixtures of the tests of file formats."""

import sys
import types

import pytest

from tests.interop.files.torch_files import Config


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


@pytest.fixture
def marker(tmp_path):
    """A file that exists if something was run."""
    return tmp_path / "it_ran"


@pytest.fixture(autouse=True)
def known_modules(monkeypatch):
    """Lets pickle write the classes of modules that are not there."""
    away = types.ModuleType("gone.away")
    away.Config = Config
    monkeypatch.setitem(sys.modules, "gone", types.ModuleType("gone"))
    monkeypatch.setitem(sys.modules, "gone.away", away)
