import pytest

from craft_jax import plugins
from craft_jax.errors import ConfigError

FILE = """
class Base: ...
class Good(dict): ...
"""


def test_a_class_from_a_file_and_from_a_module(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(FILE, encoding="utf-8")
    good = plugins.load(f"{path}:Good", "x.y", dict)
    assert good.__name__ == "Good"
    assert plugins.load(f"{path}:Good", "x.y", dict) is good
    assert plugins.load("collections:OrderedDict", "x.y", dict).__name__ == "OrderedDict"


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("missing.py:Good", "no such file"),
        ("no_such_module:Good", "ModuleNotFoundError"),
        ("own.py:Bad", "no class Bad there that derives from builtins.dict; the file has: Good"),
        ("own.py:Base", "no class Base"),
        ("broken.py:Good", "ZeroDivisionError: division by zero"),
    ],
)
def test_what_cannot_be_used(tmp_path, monkeypatch, reference, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(FILE, encoding="utf-8")
    (tmp_path / "broken.py").write_text("1 / 0", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"x\.y=") as caught:
        plugins.load(reference, "x.y", dict)
    assert expected in str(caught.value)


def test_references():
    assert plugins.is_reference("a.py:B")
    assert not plugins.is_reference("gpt")
    assert plugins.absolute("module:Class") == "module:Class"
    assert plugins.absolute("a.py:B").startswith("/")
