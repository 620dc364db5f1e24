"""Removes the prefixes of wrappers from tensor names: torch.compile, DDP, FSDP, Lightning, PEFT.

Nothing is guessed; names that would collide are an error.
"""

import fnmatch
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple, TypeVar

from interop.errors import AmbiguousSourceError, CollidingKeysError, listed

# Path segments that wrappers add, in any order and at any depth.
_WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# Heads are beside the module that a prefix names.
_HEADS = ("lm_head.", "output_projection.")
_LEGACY = {"gamma": "weight", "beta": "bias"}

V = TypeVar("V")


class Renamed(NamedTuple):
    """Tensors by clean names.

    Attributes:
      tensors: by name.
      found: the prefixes and segments that were removed.
      original: clean name to the one in the file.
    """

    tensors: dict
    found: tuple[str, ...]
    original: dict[str, str]


def is_ignored(name: str, ignore: Collection[str]) -> bool:
    """Returns whether one of the glob patterns matches a name."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in ignore)


def cleaned(
    tensors: Mapping[str, V],
    anchors: Sequence[tuple[str, str]],
    strip_prefix: str | None = None,
    ignore: Collection[str] = (),
) -> Renamed:
    """Removes the prefixes of wrappers.

    Args:
      tensors: by the names of a file.
      anchors: pairs of a name that the file must hold, and the prefix that its names lack.
      strip_prefix: read only the names with this prefix.
      ignore: glob patterns of names to leave out.

    Raises:
      CollidingKeysError: two names become one, or only some carry the prefix.
      AmbiguousSourceError: several prefixes lead to a whole model.
    """
    kept = {name: value for name, value in tensors.items() if not is_ignored(name, ignore)}
    names = {name: name for name in kept}
    if strip_prefix:
        names = {
            name: name.removeprefix(strip_prefix) for name in kept if name.startswith(strip_prefix)
        }
    segments = sorted({s for name in names.values() for s in name.split(".") if s in _WRAPPERS})
    names = {original: _unwrapped(name) for original, name in names.items()}
    _check_distinct(names)
    prefix, missing = _prefix(names.values(), anchors)
    found = [f"{segment}." for segment in segments] + ([prefix] if prefix else [])
    if prefix:
        without = [name for name in names.values() if not name.startswith(prefix)]
        inside = {name.removeprefix(prefix) for name in names.values()}
        if mixed := [name for name in without if name in inside]:
            raise CollidingKeysError(
                f"tensors are there with the prefix {prefix!r} and without it: {listed(mixed)}"
            )
        names = {original: name.removeprefix(prefix) for original, name in names.items()}
    if missing:
        head = (*_HEADS, missing)
        names = {o: n if n.startswith(head) else missing + n for o, n in names.items()}
    names = {original: _modern(name) for original, name in names.items()}
    _check_distinct(names)
    return Renamed(
        {name: kept[original] for original, name in names.items()},
        tuple(found),
        {name: original for original, name in names.items()},
    )


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _modern(name: str) -> str:
    """Undoes TensorFlow's names of layer norms."""
    head, _, last = name.rpartition(".")
    return f"{head}.{_LEGACY[last]}" if last in _LEGACY else name


def _check_distinct(names: Mapping[str, str]) -> None:
    seen: dict[str, str] = {}
    for original, name in names.items():
        if name in seen:
            raise CollidingKeysError(
                f"{seen[name]} and {original} both become {name}; keep one of them with "
                "`strip_prefix` or `ignore_keys`"
            )
        seen[name] = original


def _prefix(names: Collection[str], anchors: Sequence[tuple[str, str]]) -> tuple[str, str]:
    """Returns the one prefix before an anchor, and the prefix that the names lack."""
    for anchor, missing in anchors:
        found = sorted(
            {
                name.removesuffix(anchor)
                for name in names
                if name == anchor or name.endswith(f".{anchor}")
            }
        )
        if len(found) > 1:
            raise AmbiguousSourceError(
                f"there are several sets of weights, with the prefixes {listed(map(repr, found))}; "
                "choose one with `strip_prefix`"
            )
        if found:
            return found[0], missing
    return "", ""
