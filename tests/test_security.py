"""Nothing on a load path runs code, except files that the user names."""

import ast
import json

import pytest

from craft_jax import main as cli
from tests.conftest import ROOT, micro

# Who may do what, and why.
ALLOWED = {
    # The user's own config file and classes.
    ("craft_jax/config_file.py", "exec_module"),
    ("craft_jax/plugins.py", "exec_module"),
    # Sends datasets to worker processes that the same program started, through a pipe.
    ("craft_jax/data/workers.py", "ForkingPickler.loads"),
}
FORBIDDEN = {
    "pickle.load", "pickle.loads", "pickle.Unpickler", "torch.load", "marshal.load",
    "marshal.loads", "shelve.open", "dill.load", "dill.loads", "cloudpickle.load",
    "cloudpickle.loads",
    "joblib.load", "yaml.load", "yaml.unsafe_load", "exec_module", "ForkingPickler.loads",
}  # fmt: skip
BUILTIN = {"eval", "exec", "compile"}


def calls(source: str) -> set[str]:
    """Returns the calls in a source that can run code of what they read."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {k.arg: ast.unparse(k.value) for k in node.keywords}
        found |= {name} & BUILTIN
        if name != "torch.load" or given.get("weights_only") != "True":
            found |= {word for word in FORBIDDEN if name == word or name.endswith(f".{word}")}
        if given.get("allow_pickle", "False") != "False":
            found.add("allow_pickle")
    return found


@pytest.mark.parametrize("folder", ["craft_jax", "interop"])
def test_no_load_path_runs_code(folder):
    found = {
        (path.relative_to(ROOT).as_posix(), call)
        for path in (ROOT / folder).rglob("*.py")
        for call in calls(path.read_text(encoding="utf-8"))
    }
    assert found <= ALLOWED, found - ALLOWED


def test_this_test_sees_what_it_must_see():
    assert calls("import pickle\npickle.load(f)") == {"pickle.load"}
    assert calls("np.load(f, allow_pickle=True)") == {"allow_pickle"}
    assert calls("torch.load(f)") == {"torch.load"}
    assert calls("torch.load(f, weights_only=True)") == set()


def test_a_run_is_resumed_from_json_alone(text_file, workdir, tmp_path, monkeypatch):
    monkeypatch.setenv("API_TOKEN", "a-secret-of-the-environment")
    # The schedule ends where it does for others, so that one program serves both trainings.
    once = micro(text_file, optim__decay_steps=6, training__sample_every=0)
    assert cli.main([*once, "--run=mine", f"--workdir={workdir}"]) == 0
    folder = workdir / "models" / "mine"
    touched = tmp_path / "touched"
    for place in (folder, folder / "checkpoints", folder / "checkpoints" / "6"):
        for name in ("config.py", "gpt.py", "conftest.py", "sitecustomize.py", "jax.py"):
            (place / name).write_text(f"open({str(touched)!r}, 'w')\n", encoding="utf-8")
    monkeypatch.chdir(folder)
    more = "--config.training.num_steps=8"
    assert cli.main(["--run=mine", f"--workdir={workdir}", more]) == 0
    assert not touched.exists()
    for path in folder.rglob("*.json"):
        content = path.read_text(encoding="utf-8")
        json.loads(content)
        assert "a-secret-of-the-environment" not in content, path
