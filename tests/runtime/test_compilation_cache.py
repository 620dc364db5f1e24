import os
import stat
import subprocess
import sys
from pathlib import Path

from craft_jax.runtime import compilation_cache
from tests.conftest import environment

COMPILE = """
import os, sys
import jax
from craft_jax.runtime import compilation_cache
compilation_cache._CACHE_SECONDS = 0.0
for os.environ["XDG_CACHE_HOME"] in sys.argv[1:]:
    compilation_cache.enable_compilation_cache()
print(jax.config.jax_compilation_cache_dir or "none")
print(jax.jit(lambda x: (x @ x).sum())(jax.numpy.ones((8, 8))))
"""


def compiled_in(*homes, **more):
    """Returns the folder that a process keeps programs in, the first of some that it can have."""
    env = environment() | {"JAX_COMPILATION_CACHE_DIR": ""} | more
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", COMPILE, *map(str, homes)],
        capture_output=True,
        text=True,
        env=env,
        check=False,
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    folder, value = done.stdout.split()
    assert value == "512.0"
    return folder


def test_compiled_programs_are_kept_for_their_owner_alone(tmp_path):
    folder = compiled_in(tmp_path)
    assert folder.startswith(str(tmp_path / "craft_jax/xla-"))
    assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
    first = {file.name: file.read_bytes() for file in _files(folder)}
    assert first
    os.chmod(folder, 0o755)
    assert compiled_in(tmp_path) == folder
    assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
    assert {file.name: file.read_bytes() for file in _files(folder)} == first
    for file in _files(folder):  # As after a kill in the middle of a write.
        file.write_bytes(file.read_bytes()[:20])
    compiled_in(tmp_path)


def test_where_compiled_programs_cannot_be_kept(tmp_path):
    (tmp_path / "file").write_text("")
    assert compiled_in(tmp_path, JAX_ENABLE_COMPILATION_CACHE="false") == "none"
    own = tmp_path / "own"
    assert compiled_in(tmp_path, JAX_COMPILATION_CACHE_DIR=str(own)) == str(own)
    folder = compiled_in(tmp_path)
    for file in _files(folder):
        file.unlink()
    os.rmdir(folder)
    os.symlink(tmp_path, folder)  # Another may have put it there.
    # What cannot be had leaves no trace, so that one process can try all of them.
    assert compiled_in(tmp_path / "file", "/proc/nowhere", tmp_path) == "none"


def test_old_programs_are_removed(tmp_path):
    for number in range(5):
        file = tmp_path / str(number)
        file.write_bytes(bytes(10))
        os.utime(file, (1000 + number, 1000 + number))
    compilation_cache.keep_newest(tmp_path, 25)
    assert sorted(os.listdir(tmp_path)) == ["3", "4"]


def _files(folder):
    return [path for path in Path(folder).iterdir() if path.is_file()]
