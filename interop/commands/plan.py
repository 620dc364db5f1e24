"""The plan of an export, computed from headers alone."""

import dataclasses
import importlib
import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from craft_jax.data.tokenizers import Tokenizer
from craft_jax.errors import UsageError
from interop.files.shards import parse_size
from interop.mapping import dtypes, folds, pipeline
from interop.mapping.spec import Spec
from interop.mapping.table import Mapping as Rules
from interop.mapping.tensors import Abstract
from interop.sources import opening, source
from interop.sources.source import Options, Source
from interop.targets.base import FILES, Allowed
from interop.targets.registry import Target, choose

_SHARD_SIZE = "5GB"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The plan of an export, computed from metadata alone.

    Attributes:
      source: the model, with dtype and rows as they will be written.
      target: the target.
      spec: the model as the target will hold it.
      rules: from leaves to tensors.
      tensors: the tensors to write, by name, in order.
      approximations: the limits crossed, reason by name; empty for an exact export.
      trimmed: rows that are left out, or None.
      tokenizer: or None.
      dtype: as given.
      max_shard_size: in bytes.
      budget: bytes in flight at once.
    """

    source: Source
    target: Target
    spec: Spec
    rules: Rules
    tensors: dict[str, Abstract]
    approximations: Mapping[str, str]
    trimmed: Mapping[str, Any] | None
    tokenizer: Tokenizer | None
    dtype: str
    max_shard_size: int
    budget: int

    @property
    def is_exact(self) -> bool:
        """Returns whether every bit and every number survives."""
        return not self.approximations and self.dtype == "keep" and self.trimmed is None

    @property
    def stored(self) -> dict[str, Abstract]:
        """The tensors stored in the file: of tied names, the first."""
        names = [one.targets[0] for one in self.rules.rules]
        return {name: self.tensors[name] for name in names}

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors in the output."""
        return sum(tensor.nbytes for tensor in self.stored.values())

    @property
    def peak_bytes(self) -> int:
        """An estimate of the arrays in memory at once."""
        per_rule = [
            2 * sum(self.source.leaves[name].nbytes for name in one.sources)
            for one in self.rules.rules
        ]
        return max(min(self.budget, sum(per_rule)), *per_rule)

    def to_json(self) -> dict[str, Any]:
        """Returns the plan as plain JSON."""
        return {
            "source": str(self.source.path),
            "step": self.source.step,
            "target": self.target.name,
            "exact": self.is_exact,
            "approximations": dict(self.approximations),
            "synthetic": list(self.rules.synthetic),
            "trimmed_rows": (self.trimmed or {}).get("rows", 0),
            "dtype": self.dtype,
            "tokenizer": self.tokenizer is not None,
            "parameters": self.source.num_params,
            "bytes": self.num_bytes,
            "peak_bytes": self.peak_bytes,
            "warnings": list(self.source.notes),
            "tensors": {
                name: {
                    "dtype": tensor.dtype.name,
                    "shape": list(tensor.shape),
                    "from": list(self.rules.rule_of[name].sources),
                }
                for name, tensor in self.tensors.items()
            },
        }


def plan(
    ckpt: "str | Path | Source",
    target: str = "auto",
    *,
    family: str | None = None,
    dtype: str = "keep",
    max_shard_size: str | int = _SHARD_SIZE,
    max_memory: str | int | None = None,
    tokenizer: str | Path | None = None,
    trim_vocab: bool = False,
    allow_approx: Any = None,
    options: Options | None = None,
) -> Plan:
    """Plans an export; reads configs and headers, and no array.

    Args:
      ckpt: a run, a checkpoint, or anything else that `open_source` opens.
      target: the name of a target, `hf`, or `auto`.
      family: of Hugging Face, such as `gpt2`; None for the best.
      dtype: keep, fp32, bf16, fp16 or fp64.
      max_shard_size: bytes of tensors in a safetensors file, such as `5GB`.
      max_memory: bytes of arrays in flight at once.
      tokenizer: a folder or file that replaces the run's; `none` for none.
      trim_vocab: leave out embedding rows that stand for no token.
      allow_approx: True, or names; see docs/interop.md.
      options: how to read a foreign source.

    Raises:
      UsageError, InteropError: it cannot be done; nothing was written.
    """
    opened = ckpt if isinstance(ckpt, Source) else opening.open_source(ckpt, options)
    if opened.kind == source.CRAFT and options is not None:
        options.check_unused(str(ckpt))
    opened = dataclasses.replace(opened, tokenizer=opening.tokenizer_of(opened, tokenizer))
    cut = None
    if trim_vocab:
        opened, cut = source.trimmed(opened)
    opened = source.with_dtype(opened, dtypes.named(dtype))
    allowed = Allowed.of(allow_approx)
    chosen = choose(opened.spec, target, family, allowed)
    reading = chosen.fit(opened.spec, allowed)
    if reading.spec != opened.spec:
        found = folds.towards(opened.spec, opened.leaves, reading.spec)
        opened = dataclasses.replace(opened, spec=reading.spec, leaves=found)
    rules = chosen.mapping(reading.spec)
    if chosen.container in FILES and max_shard_size != _SHARD_SIZE:
        raise UsageError(f"`max_shard_size={max_shard_size}`: {chosen.name} is one file")
    return Plan(
        source=opened,
        target=chosen,
        spec=reading.spec,
        rules=rules,
        tensors=rules.shapes(opened.leaves),
        approximations=reading.approximations,
        trimmed=cut,
        tokenizer=opened.tokenizer,
        dtype=dtype,
        max_shard_size=_size("max_shard_size", max_shard_size),
        budget=memory_size(max_memory),
    )


def memory_size(max_memory: str | int | None) -> int:
    """Returns the bytes that `max_memory` names; the default for None.

    Raises:
      UsageError: it names none.
    """
    return _size("max_memory", max_memory or pipeline.DEFAULT_BUDGET)


def _size(option: str, size: str | int) -> int:
    try:
        return parse_size(size)
    except ValueError as error:
        raise UsageError(f"`{option}`: {error}") from None


def as_source(model: Any) -> "str | Path | Source":
    """Returns a path or a source for a path, a `Run`, or a model object."""
    if isinstance(model, (str, Path, Source)):
        return model
    if isinstance(model, importlib.import_module("craft_jax.runs").Run):
        return model.paths.checkpoints / str(model.step)
    return importlib.import_module("interop.sources.live").source_of(model)
