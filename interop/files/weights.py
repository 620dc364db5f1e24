"""The weights of a model in the ways Hugging Face stores them: a file, or a folder with shards.

Returns named lazy arrays, once all files and indexes of a folder agree.
"""

import dataclasses
import itertools
import json
import re
import reprlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from interop.errors import (
    AmbiguousSourceError,
    CorruptFileError,
    DtypeError,
    UnknownArchitectureError,
    listed,
)
from interop.files.pickles import StoredTensor
from interop.files.safetensors import read_safetensors, unique_names
from interop.files.shards import INDEX, SINGLE
from interop.files.torchfile import read_torch_file
from interop.mapping.tensors import LazyTensor, same_bits

# Best first; the others are compared with the first that exists.
_STANDARD = (SINGLE, INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")
_INDEX_SUFFIX = ".index.json"
_TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_SHARD = re.compile(r".+-\d{5,}-of-\d{5,}\.(safetensors|bin)")
_MAX_INDEX_BYTES = 100_000_000
_MAX_DIFFERENCES = 3
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 100


@dataclasses.dataclass(frozen=True)
class Weights:
    """The weights at a path.

    Attributes:
      tensors: the arrays by name; empty for a torch file that is not a flat dict of tensors.
      files: the files that they are in.
      notes: remarks on the choice of files.
      container: the whole content of a torch file; None for other files, and for folders.
      metadata: text from safetensors headers.
    """

    tensors: dict[str, LazyTensor]
    files: tuple[Path, ...]
    notes: tuple[str, ...] = ()
    container: Any = None
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)


def open_weights(path: Path, allow_globals: Collection[str] = ()) -> Weights:
    """Opens a file of weights, an index of shards, or a folder with either.

    Args:
      path: the file or folder. The content of a file determines its format, not its name.
      allow_globals: see `read_torch_file`.

    Raises:
      CorruptFileError: there are no weights, they are damaged, or an index disagrees with them.
      AmbiguousSourceError: a folder holds several sets of weights that differ.
      UnknownArchitectureError: a folder holds an adapter only.
      DtypeError: a tensor has a dtype that numpy does not have.
      UnsafePickleError: a pickle asks for a name that is not known to be harmless.
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path, allow_globals)
    if path.name.endswith(_INDEX_SUFFIX):
        return _open_index(path, allow_globals)
    return _open_file(path, allow_globals)


# ---- one file


def _open_file(path: Path, allow_globals: Collection[str]) -> Weights:
    if not _is_torch(path):
        file = read_safetensors(path)
        return Weights(file.tensors, (path,), metadata=file.metadata)
    found = read_torch_file(path, allow_globals)
    return Weights(
        dict(found.value) if _is_flat(found.value) else {},
        (path,),
        notes=tuple(f"{path.name}: an object that is not read, {what}" for what in found.dropped),
        container=found.value,
    )


def _is_torch(path: Path) -> bool:
    if path.is_file():
        try:
            with path.open("rb") as file:
                head = file.read(9)
        except OSError:
            head = b""
        # A header length can begin with the same bytes as a zip archive or a pickle.
        if head[8:] == b"{":
            return False
        if head.startswith((b"PK\x03\x04", b"\x80")):
            return True
    return path.suffix in _TORCH_SUFFIXES


def _is_flat(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(name, str) and isinstance(tensor, LazyTensor) for name, tensor in value.items()
    )


def _open_flat(path: Path, allow_globals: Collection[str]) -> Weights:
    """Opens a file, or an index, that must hold nothing but tensors."""
    if path.name.endswith(_INDEX_SUFFIX):
        return _open_index(path, allow_globals)
    weights = _open_file(path, allow_globals)
    if weights.container is not None and not weights.tensors:
        raise CorruptFileError(
            f"{path} is not a flat dict of tensors; save the state_dict of the model, or name the "
            "file instead of its folder",
            path=str(path),
        )
    return dataclasses.replace(weights, container=None)


# ---- a folder


def _open_folder(folder: Path, allow_globals: Collection[str]) -> Weights:
    names = _listed_folder(folder)
    found = [name for name in _STANDARD if name in names]
    first, *others = found or [_only_other(folder, names)]
    weights = _open_flat(folder / first, allow_globals)
    notes, known = list(weights.notes), set(weights.files)
    if not found:
        notes.append(f"{folder} has no {SINGLE}; {first} is used, its only file of weights")
    for other in others:
        second = _compared(folder, first, weights, other, allow_globals)
        known |= set(second.files)
        notes.append(f"{other} has the same tensors as {first}, which is used")
    notes += _leftovers(names, {file.name for file in known})
    return dataclasses.replace(weights, notes=tuple(notes))


def _listed_folder(folder: Path) -> list[str]:
    try:
        # Names with a dot are system files, such as `._model.safetensors`.
        return sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
    except OSError as error:
        raise CorruptFileError(
            f"{folder} cannot be listed: {error.strerror}; check its permissions", path=str(folder)
        ) from None


def _only_other(folder: Path, names: Sequence[str]) -> str:
    """Returns the one file of weights in a folder that has none with a usual name."""
    shards = [name for name in names if _SHARD.fullmatch(name)]
    if shards:
        raise CorruptFileError(
            f"{folder} has shards without an index: {listed(shards)}; add {INDEX}, which "
            "lists them",
            path=str(folder),
        )
    adapter = [name for name in _ADAPTER if name in names]
    if adapter:
        raise UnknownArchitectureError(
            f"{folder} has an adapter (LoRA) without its model: {', '.join(adapter)}; merge it "
            "into the model first (merge_and_unload of peft), and name the merged one",
            path=str(folder),
        )
    others = [name for name in names if name.endswith(".safetensors")]
    if len(others) > 1:
        raise AmbiguousSourceError(
            f"{folder} has several files of weights: {listed(others)}; name one of them",
            path=str(folder),
            files=others,
        )
    if not others:
        has = f"it has {listed(names)}" if names else "it is empty"
        raise CorruptFileError(
            f"{folder} has no weights: none of {', '.join(_STANDARD)}; {has}; name another folder, "
            "or the file of weights itself",
            path=str(folder),
        )
    return others[0]


def _leftovers(names: Iterable[str], known: Collection[str]) -> Iterator[str]:
    """Yields notes on unused files of weights."""
    unknown = [name for name in names if name not in known]
    stale = [name for name in unknown if _SHARD.fullmatch(name)]
    if stale:
        yield f"{listed(stale)}: in no index, not used"
    others = [n for n in unknown if n.endswith(".safetensors") and n not in stale]
    if others:
        yield f"{listed(others)}: beside the weights, not used"


def _compared(
    folder: Path, first: str, weights: Weights, other: str, allow_globals: Collection[str]
) -> Weights:
    """Opens other weights of the same folder, which must have the same bits."""
    remedy = "name the one to use instead of the folder, or remove the other"
    files = {"path": str(folder), "files": [first, other]}
    try:
        second = _open_flat(folder / other, allow_globals)
    except (CorruptFileError, DtypeError) as error:
        raise AmbiguousSourceError(
            f"{folder} has {first} and {other}, which cannot be compared: {error}; {remedy}",
            **files,
        ) from None
    found = _differences(first, weights.tensors, other, second.tensors)
    different = list(itertools.islice(found, _MAX_DIFFERENCES))
    if different:
        raise AmbiguousSourceError(
            f"{folder} has {first} and {other}, which differ: {'; '.join(different)}; {remedy}",
            **files,
        )
    return second


def _differences(
    first: str, a: Mapping[str, LazyTensor], second: str, b: Mapping[str, LazyTensor]
) -> Iterator[str]:
    """Yields the differences, reading one tensor of each at a time."""
    both = a.keys() & b.keys()
    for file, tensors in ((first, a), (second, b)):
        memories = _memories(tensors[name] for name in both)
        for name, tensor in tensors.items():
            # Only one of the formats can store the second name of a shared array.
            if name not in both and not _memories([tensor]) & memories:
                yield f"{_SHORT.repr(name)} is only in {file}"
    for name in (name for name in a if name in both):
        x, y = a[name], b[name]
        if (x.shape, x.dtype) != (y.shape, y.dtype):
            yield (
                f"{_SHORT.repr(name)} is {x.dtype} {list(x.shape)} in {first}, and {y.dtype} "
                f"{list(y.shape)} in {second}"
            )
        elif not same_bits(x.read(), y.read()):
            yield f"{_SHORT.repr(name)} has other values"


def _memories(tensors: Iterable[LazyTensor]) -> set[Any]:
    return {tensor.memory for tensor in tensors if isinstance(tensor, StoredTensor)}


# ---- an index and its shards


def _open_index(index: Path, allow_globals: Collection[str]) -> Weights:
    described = _read_index(index)
    home = _checked_map(index, described.get("weight_map"))
    files = sorted(set(home.values()))
    missing = [file for file in files if not (index.parent / file).exists()]
    if missing:
        raise CorruptFileError(
            f"{index} names shards that are not there: {listed(missing)}; download them",
            path=str(index),
            missing=missing,
        )
    shards = {file: _open_flat(index.parent / file, allow_globals) for file in files}
    _check_places(index, home, shards)
    tensors = {
        name: _in_shard(file, tensor)
        for file, shard in shards.items()
        for name, tensor in shard.tensors.items()
    }
    _check_total(index, described.get("metadata"), tensors)
    return Weights(
        tensors,
        tuple(index.parent / file for file in files),
        notes=tuple(note for shard in shards.values() for note in shard.notes),
        metadata={k: v for shard in shards.values() for k, v in shard.metadata.items()},
    )


def _in_shard(file: str, tensor: LazyTensor) -> LazyTensor:
    """Returns a tensor whose `memory`, which only one file knows, does not equal another's."""
    if not isinstance(tensor, StoredTensor):
        return tensor
    return dataclasses.replace(tensor, memory=(file, tensor.memory))


def _read_index(index: Path) -> dict[str, Any]:
    try:
        size = index.stat().st_size
        if size > _MAX_INDEX_BYTES:
            raise ValueError(f"{size} bytes are more than an index has")
        found = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=unique_names)
    except OSError as error:
        raise CorruptFileError(
            f"{index} cannot be read: {error.strerror}; check the path", path=str(index)
        ) from None
    except (ValueError, RecursionError) as error:
        raise _bad_index(index, f"is no JSON: {error}; download it again") from None
    if not isinstance(found, dict):
        raise _bad_index(index, "is not a JSON object; download it again")
    return found


def _bad_index(index: Path, what: str) -> CorruptFileError:
    return CorruptFileError(f"{index} {what}", path=str(index))


def _checked_map(index: Path, home: Any) -> dict[str, str]:
    if not isinstance(home, dict) or not home:
        raise _bad_index(
            index, "has no weight_map from tensors to the files they are in; download it again"
        )
    for name, file in home.items():
        if not isinstance(file, str) or not _is_file_name(file):
            raise _bad_index(
                index,
                f"maps tensor {_SHORT.repr(name)} to {_SHORT.repr(file)}, which is not the name "
                "of a file beside it; get the index from a source that you trust",
            )
    return home


def _is_file_name(text: str) -> bool:
    return text not in ("", ".", "..") and not re.search(r"[/\\\x00-\x1f\ud800-\udfff]", text)


def _check_places(index: Path, home: Mapping[str, str], shards: Mapping[str, Weights]) -> None:
    """Checks that the index and the shards agree on where each tensor is."""
    seen: dict[str, str] = {}
    for file, shard in shards.items():
        twice = [name for name in shard.tensors if name in seen]
        if twice:
            raise _bad_index(
                index,
                f"joins {seen[twice[0]]} and {file}, which both have {listed(twice)}; remove the "
                "shards that do not belong to it",
            )
        seen |= dict.fromkeys(shard.tensors, file)
        strangers = [name for name in shard.tensors if name not in home]
        if strangers:
            raise _bad_index(
                index, f"lacks {listed(strangers)}, which {file} has; download both again"
            )
    lost = [name for name in home if name not in seen]
    if lost:
        raise _bad_index(
            index, f"maps {listed(lost)} to {home[lost[0]]}, which lacks it; download both again"
        )
    moved = [name for name, file in home.items() if seen[name] != file]
    if moved:
        raise _bad_index(
            index,
            f"maps {listed(moved)} to {home[moved[0]]}, and {seen[moved[0]]} has it; download all "
            "again",
        )


def _check_total(index: Path, metadata: Any, tensors: Mapping[str, LazyTensor]) -> None:
    if metadata is not None and not isinstance(metadata, dict):
        raise _bad_index(index, f"has metadata {_SHORT.repr(metadata)}, not an object")
    claimed = (metadata or {}).get("total_size")
    if claimed is None:
        return
    total = sum(tensor.nbytes for tensor in tensors.values())
    # Some writers count an array with two names once.
    shared = {t.memory: t.nbytes for t in tensors.values() if isinstance(t, StoredTensor)}
    own = sum(t.nbytes for t in tensors.values() if not isinstance(t, StoredTensor))
    if claimed not in (total, own + sum(shared.values())):
        raise CorruptFileError(
            f"{index} says total_size {_SHORT.repr(claimed)}, and its shards have {total} bytes of "
            "tensors; download all again",
            path=str(index),
            expected=claimed,
            actual=total,
        )
