"""Measures export and import: time beside `cp`, and memory: python scripts/measure_interop.py.

A run of GPT-2's size (124M, float32) is exported to Hugging Face, command line and all, beside `cp`
and fsync of the same bytes, five times in turn. A run of 1.5 GB is exported and imported while the
peak of its anonymous memory (RssAnon) is watched. Takes about 6 GB of disk, in a temporary folder.
"""

import argparse
import dataclasses
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np

from interop.commands.import_ import write_run
from interop.mapping.shapes import leaves
from interop.mapping.spec import ModelSpec
from interop.mapping.tensors import LazyTensor
from interop.sources.source import CRAFT, Source

GPT2 = ModelSpec(
    vocab_size=50257,
    num_layers=12,
    num_heads=12,
    d_model=768,
    d_ff=3072,
    max_seq_len=1024,
    activation="gelu",
    bias=True,
    tie_embeddings=True,
    norm_eps=1e-5,
)
LARGE = dataclasses.replace(
    GPT2, vocab_size=32000, d_model=1536, d_ff=6144, num_layers=11, num_heads=16
)
NO_CHECKS = ("--verify", "none", "--probe", "none")


def make_run(folder: Path, spec: ModelSpec) -> Path:
    """Makes a run with random weights."""

    def read(name: str, shape: tuple[int, ...]) -> np.ndarray:
        rng = np.random.default_rng(len(name))
        return 0.02 * rng.standard_normal(shape, np.float32)

    found = {
        name: LazyTensor(leaf.shape, leaf.dtype, lambda n=name, s=leaf.shape: read(n, s))
        for name, leaf in leaves(spec).items()
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_run(
        Source(path=folder, run="made", kind=CRAFT, spec=spec, leaves=found, tokenizer=None),
        folder,
        folder,
        spill=True,
    )
    return folder


def interop(*words: object) -> tuple[float, int]:
    """Runs a command; returns its seconds and the peak of its RssAnon in MB."""
    start, peak = time.monotonic(), 0
    process = subprocess.Popen(
        [sys.executable, "-m", "interop", *map(str, words)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None:
        peak = max(peak, _anonymous(process.pid))
        time.sleep(0.005)
    seconds = time.monotonic() - start
    if process.returncode:
        sys.exit(f"{words} ended with {process.returncode}")
    return seconds, peak


def _anonymous(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    kilobytes = [int(line.split()[1]) for line in lines if line.startswith("RssAnon")]
    return kilobytes[0] // 1000 if kilobytes else 0


def copy(source: Path, target: Path) -> float:
    """Copies a file, and waits until it is on disk; returns seconds."""
    start = time.monotonic()
    subprocess.run(["cp", source, target], check=True)
    subprocess.run(["sync", target], check=True)
    return time.monotonic() - start


def speed(place: Path, repeats: int) -> None:
    """Exports 124M parameters beside cp."""
    run = make_run(place / "models" / "gpt2", GPT2)
    seconds: dict[str, list[float]] = {"cp + fsync": [], "no checks": [], "default": []}
    out, other = place / "out", place / "copy"
    interop("export", run, out, "--to", "hf", *NO_CHECKS)
    for _ in range(repeats):
        seconds["cp + fsync"].append(copy(out / "model.safetensors", other))
        other.unlink()
        shutil.rmtree(out)
        seconds["no checks"].append(interop("export", run, out, "--to", "hf", *NO_CHECKS)[0])
    for _ in range(min(repeats, 3)):
        shutil.rmtree(out)
        seconds["default"].append(interop("export", run, out, "--to", "hf")[0])
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, values in seconds.items():
        print(f"124M {name:<12} median {medians[name]:.2f} s of {[round(v, 2) for v in values]}")
    limit = 3 * medians["cp + fsync"] + 2.5
    print(f"124M limit 3 x cp + 2.5 s = {limit:.2f} s; export {medians['no checks']:.2f} s")
    shutil.rmtree(place / "out")
    shutil.rmtree(place / "models")


def memory(place: Path) -> None:
    """Exports and imports 1.5 GB."""
    run = make_run(place / "models" / "large", LARGE)
    sizes = {name: leaf.nbytes for name, leaf in leaves(LARGE).items()}
    largest = max(sizes.values()) // 10**6
    print(f"{sum(sizes.values()) / 1e9:.2f} GB, largest leaf {largest} MB")
    base = {
        "export": _peak_of("import interop.commands.export"),
        "import": _peak_of("import interop.commands.import_"),
    }
    for name, words in {
        "export to hf": ("export", run, place / "hf", "--to", "hf", *NO_CHECKS),
        "export to nanogpt": ("export", run, place / "x.pt", "--to", "nanogpt", *NO_CHECKS),
        "import of hf": ("import", place / "hf", place / "models" / "a", *NO_CHECKS),
        "import of nanogpt": ("import", place / "x.pt", place / "models" / "b", *NO_CHECKS),
        "export, default": ("export", run, place / "hf2", "--to", "hf"),
        "import, default": ("import", place / "hf", place / "models" / "c"),
    }.items():
        seconds, peak = interop(*words)
        above = peak - base[words[0]]
        print(
            f"{name:<18} {seconds:.1f} s, RssAnon {peak} MB: {above} MB above the libraries; "
            f"allowed {400 + 3 * largest} MB"
        )


def _peak_of(code: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nprint(open('/proc/self/status').read())"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    return next(
        int(line.split()[1]) // 1000
        for line in done.stdout.splitlines()
        if line.startswith("RssAnon")
    )


def main() -> None:
    """Measures what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", default=["speed", "memory"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", help="where to work (default: the system's)")
    args = parser.parse_args()
    for what in args.what:
        with tempfile.TemporaryDirectory(dir=args.folder, prefix="interop_") as folder:
            if what == "speed":
                speed(Path(folder), args.repeats)
            else:
                memory(Path(folder))


if __name__ == "__main__":
    main()
