"""How fast and in how much memory a large text is tokenized, killed half way and gone on with.

    python scripts/tokenize_speed.py                       # a gigabyte, BPE and characters
    python scripts/tokenize_speed.py --megabytes=100 --tokenizers=bpe

The text is the source of Python's own standard library, again and again, each time with other
numbers in it; or that of `--text`. For each tokenizer `prepare` runs in a process of its own, is
killed half way, and run again. Memory is that of the process and its children together, pages that
they share counted once (PSS). The limit is what the `tokenizers` library's own `encode_batch` makes
of the same file, its ids thrown away. The last line is JSON.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tokenizers import Tokenizer

from craft_jax.data.sources import files as sources
from craft_jax.data.sources.documents import pieces

_GROUP = 32
_PRESET = "configs/gpt.py"


def main() -> None:
    """Makes the text, measures each tokenizer, and prints what was seen."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--tokenizers", default="bpe,char")
    parser.add_argument("--vocab_size", type=int, default=32000)
    parser.add_argument("--text", type=Path, help="a text file to repeat instead")
    parser.add_argument("--limit_megabytes", type=int, default=64, help="read for the limit")
    args = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        size = make_text(text, args.megabytes * 10**6, args.text)
        print(f"text: {size / 1e6:.0f} MB", flush=True)
        for kind in args.tokenizers.split(","):
            results[kind] = measure(kind, text, size, Path(folder), args)
            print(f"{kind}: {results[kind]}", flush=True)
    print(json.dumps(results))


def make_text(file: Path, size: int, given: Path | None) -> int:
    """Writes `size` bytes of real text and returns how many there are."""
    if given:
        text = given.read_text(encoding="utf-8")
    else:
        found = sources.open_files(None)
        documents = (d for part in found.parts() for d in part.documents())
        text = "".join(chunk for d in documents for chunk in d.read())
    written, copy = 0, 0
    with file.open("wb") as out:
        while written < size:
            copy += 1
            changed = text.replace("self", f"self{copy}").encode()[: size - written]
            written += out.write(changed.decode(errors="ignore").encode())
            if size - written < 4:
                break
    return written


def measure(kind: str, text: Path, size: int, folder: Path, args: argparse.Namespace) -> dict:
    """Prepares the text once whole and once killed half way, and returns what was seen."""
    whole = prepare(kind, text, folder / f"{kind}_whole", args)
    killed_at = whole["seconds"] / 2
    killed = prepare(kind, text, folder / f"{kind}_killed", args, kill_after=killed_at)
    again = prepare(kind, text, folder / f"{kind}_killed", args)
    same = digest(folder / f"{kind}_whole") == digest(folder / f"{kind}_killed")
    (tokenizer,) = (folder / f"{kind}_whole" / "data").glob("*/tokenizer.json")
    limit = encode_batch(tokenizer, text, args.limit_megabytes * 10**6)
    speed = size / 1e6 / whole["tokenizing"]
    return {
        "MB/s": round(speed, 2),
        "limit MB/s": round(limit, 2),
        "ratio": round(speed / limit, 3),
        "seconds in all": round(whole["seconds"], 1),
        "peak MB": round(max(run["peak"] for run in (whole, killed, again)) / 1e6),
        "killed after s": round(killed_at, 1),
        "then s": round(again["seconds"], 1),
        "continued": "continuing" in again["said"],
        "same bytes": same,
    }


def prepare(
    kind: str, text: Path, workdir: Path, args: argparse.Namespace, kill_after: float | None = None
) -> dict:
    """Runs the command; returns its seconds, peak memory in bytes, and what it said."""
    words = [
        sys.executable, "-m", "craft_jax.main", "prepare", f"--config={ROOT / _PRESET}",
        f"--config.data.path={text}", f"--config.data.tokenizer={kind}",
        f"--config.data.vocab_size={args.vocab_size}", f"--workdir={workdir}",
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    log = workdir.with_suffix(".log")
    start, peak = time.monotonic(), 0
    with log.open("w") as out:
        process = subprocess.Popen(
            words, env=environment, stdout=out, stderr=out, start_new_session=True
        )
        while process.poll() is None:
            peak = max(peak, memory(process.pid))
            if kill_after is not None and time.monotonic() - start > kill_after:
                os.killpg(process.pid, signal.SIGKILL)
            time.sleep(0.2)
    said = log.read_text()
    if kill_after is None and process.returncode:
        raise SystemExit(said)
    tokenizing = time.monotonic() - start
    for line in said.splitlines():
        if " became " in line:
            tokenizing = float(line.partition(" tokens in ")[2].partition(" s")[0])
    return {
        "seconds": time.monotonic() - start, "tokenizing": tokenizing, "peak": peak, "said": said
    }  # fmt: skip


def memory(pid: int) -> int:
    """Returns the bytes of memory of a process and all below it."""
    total, waiting = 0, [pid]
    while waiting:
        here = waiting.pop()
        try:
            for line in Path(f"/proc/{here}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
            for task in Path(f"/proc/{here}/task").iterdir():
                waiting += map(int, (task / "children").read_text().split())
        except OSError:  # It has ended.
            continue
    return total


def digest(workdir: Path) -> list[tuple[str, str]]:
    """Returns the checksums of the files of the cache."""
    (manifest,) = workdir.glob("data/*/manifest.json")
    files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
    return sorted((name, facts["crc32"]) for name, facts in files.items())


def encode_batch(tokenizer: Path, text: Path, size: int) -> float:
    """Returns the MB/s of the library alone on the beginning of a text."""
    inner = Tokenizer.from_file(str(tokenizer))

    def groups() -> Iterator[list[str]]:
        with text.open(encoding="utf-8") as file:
            found = list(pieces([file.read(size)]))
        for n in range(0, len(found), _GROUP):
            yield found[n : n + _GROUP]

    waiting = list(groups())
    start = time.monotonic()
    for group in waiting:
        inner.encode_batch(group, add_special_tokens=False)
    return sum(len(t.encode()) for g in waiting for t in g) / 1e6 / (time.monotonic() - start)


if __name__ == "__main__":
    main()
