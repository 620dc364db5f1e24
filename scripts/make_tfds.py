"""Turns local text, or a folder of images, into a dataset of TensorFlow Datasets (TFDS).

    python scripts/make_tfds.py --name=my_texts --data_dir=DIR --train=PATH [--validation=PATH]

PATH is a file of text with a blank line between documents (--lines: a document in each line), a
folder of text files, each a document, or a .jsonl file: of its records all fields are kept, or only
the one that --field names. With --images it is a folder with a folder of PNG files for each class.
It says where it wrote the dataset, and how to train on it. Nothing is downloaded, and TensorFlow is
not needed.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from craft_jax.data.sources.files import shown
from craft_jax.errors import CraftError, DataError, exit_code_of
from scripts import tfds_builder


def paragraphs(path: Path, is_per_line: bool) -> Iterator[str]:
    """Yields the documents of a text file: its lines, or what stands between blank lines."""
    waiting: list[str] = []
    try:
        with path.open(encoding="utf-8-sig") as file:
            for line in file:
                if line.strip():
                    waiting.append(line)
                if waiting and (is_per_line or not line.strip()):
                    yield "".join(waiting).rstrip("\n")
                    waiting = []
        if waiting:
            yield "".join(waiting).rstrip("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{shown(path)} is not UTF-8 text ({error}); convert it") from None


def records(path: Path, field: str | None) -> Iterator[dict[str, Any]]:
    """Yields the records of a .jsonl file, with all fields or one."""
    for number, line in enumerate(path.read_text("utf-8-sig").split("\n"), start=1):
        if not line.strip():
            continue
        here = f"{shown(path)} line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{here} is not JSON: {error}; fix or remove it") from None
        if not isinstance(record, dict) or (field and not isinstance(record.get(field), str)):
            raise DataError(f"{here} has no text in the field {field!r}; set --field")
        yield {field: record[field]} if field else record


def texts(path: Path, field: str | None, is_per_line: bool) -> Iterable[dict[str, Any]]:
    """Returns the records of a file or folder."""
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
        return ({field or "text": _whole(p)} for p in files)
    if path.suffix == ".jsonl":
        return records(path, field)
    return ({field or "text": text} for text in paragraphs(path, is_per_line))


def _whole(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{shown(path)} is not UTF-8 text ({error}); convert it or leave it out"
        ) from None


def classes(folders: Iterable[Path]) -> list[str]:
    """Returns the names of the folders of images, sorted."""
    names = sorted({p.name for folder in folders for p in folder.iterdir() if p.is_dir()})
    if not names:
        raise DataError("--images: there is no folder for a class, such as train/cat/1.png")
    return names


def images(folder: Path, label_names: list[str]) -> Iterator[tuple[bytes, str]]:
    """Yields the images of a split and their classes."""
    for name in label_names:
        for path in sorted((folder / name).glob("*.png")):
            yield path.read_bytes(), name


def make(args: argparse.Namespace) -> Path:
    """Writes the dataset and returns its folder."""
    paths = {"train": Path(args.train)}
    if args.validation:
        paths["validation"] = Path(args.validation)
    for split, path in paths.items():
        if not path.exists() or (args.images and not path.is_dir()):
            raise DataError(
                f"--{split}={shown(path)}: no such {'folder' if args.images else 'file'}"
            )
    if args.images:
        names = classes(paths.values())
        splits = {split: images(path, names) for split, path in paths.items()}
        return tfds_builder.build_images(args.name, args.data_dir, splits, names)
    return tfds_builder.build_records(
        args.name,
        args.data_dir,
        {split: texts(path, args.field, args.lines) for split, path in paths.items()},
    )


def main() -> int:
    """Runs the command line and returns its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", required=True, help="lowercase letters, digits and underscores")
    parser.add_argument("--data_dir", required=True, help="the folder that datasets are in")
    parser.add_argument("--train", required=True)
    parser.add_argument("--validation")
    parser.add_argument("--field", help="of records: the field to keep; of text: what to call it")
    parser.add_argument("--lines", action="store_true", help="each line is a document")
    parser.add_argument("--images", action="store_true", help="folders of PNG files")
    args = parser.parse_args()
    try:
        folder = make(args)
    except (CraftError, OSError) as error:
        print(error, file=sys.stderr)
        return exit_code_of(error)
    print(f"written to {folder}")
    words = f"--config.data.source=tfds --config.data.name={args.name}"
    print(f"train on it with: {words} --config.data.data_dir={Path(args.data_dir).resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
