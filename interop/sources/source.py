"""A model that was found: what it is, and its leaves by the names of craft_jax, read one by one."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from craft_jax.data.images.format import ImageFormat
from craft_jax.data.tokenizers import Tokenizer
from craft_jax.errors import UsageError
from interop.errors import (
    ShapeMismatchError,
)
from interop.files import hugging_face
from interop.mapping import dtypes
from interop.mapping.shapes import leaves
from interop.mapping.spec import Spec
from interop.mapping.table import Mapping as Rules
from interop.mapping.tensors import LazyTensor, Tensors
from interop.targets.base import Allowed
from interop.targets.registry import GROUPS, TARGETS, Target

CRAFT = "craft_jax"

WEIGHTS = ("average", "last")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What a person may say about a source.

    Attributes:
      kind: `auto`, or the name of a target; `hf` for a Hugging Face folder, `craft` for a file or
        folder of Craft.
      num_heads: for tensors without a config.
      config: a config for tensors without one: a file, or JSON that begins with `{`.
      strip_prefix, ignore_keys: see `names.cleaned`.
      allow_approx: approximations, see `Allowed`.
      allow_globals: names that a pickle may mention; they become inert stubs.
      drop_zero_bias: read biases that are all zero as no biases.
      weights: of a run whose optimizer kept an average of them: `average`, or the `last` ones.
      recorded: the part of a manifest that an export has not written yet when it reads back.
    """

    kind: str = "auto"
    num_heads: int | None = None
    config: str | Path | None = None
    strip_prefix: str | None = None
    ignore_keys: tuple[str, ...] = ()
    allow_approx: Any = None
    allow_globals: tuple[str, ...] = ()
    drop_zero_bias: bool = False
    weights: str = "average"
    recorded: Mapping[str, Any] | None = None

    def __post_init__(self):
        if self.kind not in GROUPS and self.kind not in TARGETS:
            kinds = ", ".join((*GROUPS, *TARGETS))
            raise UsageError(f"--from {self.kind} is not one of {kinds}")
        if self.weights not in WEIGHTS:
            raise UsageError(f"--weights {self.weights} is not one of {', '.join(WEIGHTS)}")
        Allowed.of(self.allow_approx)

    @property
    def targets(self) -> tuple[Target, ...]:
        """The targets that the source may be in the form of."""
        return tuple(TARGETS[name] for name in GROUPS.get(self.kind, (self.kind,)))

    def given_config(self) -> dict[str, Any] | None:
        """Returns the config that was given, or None.

        Raises:
          UsageError: there is no such file.
          CorruptFileError: it is no JSON object.
        """
        if self.config is None:
            return None
        if str(self.config).lstrip().startswith("{"):
            try:
                return dict(json.loads(str(self.config)))
            except ValueError as error:
                raise UsageError(f"--config {self.config}: no JSON: {error}") from None
        if not Path(self.config).is_file():
            raise UsageError(f"--config {self.config}: no such file")
        return hugging_face.read_json(Path(self.config))

    def check_unused(self, place: str) -> None:
        """Checks that nothing is said about a source that is a run, which knows all of it itself.

        Raises:
          UsageError: something is.
        """
        default = Options()
        flags = {"kind": "--from", "num_heads": "--n-head", "allow_globals": "--allow-global"}
        said = [
            flags.get(field.name, "--" + field.name.replace("_", "-"))
            for field in dataclasses.fields(self)
            if field.name not in ("allow_approx", "weights")
            and getattr(self, field.name) != getattr(default, field.name)
        ]
        if said:
            raise UsageError(
                f"{', '.join(said)}: {place} is a run of craft_jax, which says all of that itself; "
                "leave it out"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A model, found.

    Attributes:
      path: where.
      run: the name of the run that the weights come from, as far as it is known.
      kind: `craft_jax`, or the name of the target that it is in the form of.
      spec: what it is.
      leaves: its parameters by the names of craft_jax; read when asked for.
      tokenizer: or None.
      images: what the images are that it was trained on; None for text, or where nothing says.
      step: updates made, where that is known.
      metrics: of the last evaluation, where they are known.
      rules: between leaves and `tensors`; None for a run.
      tensors: by the target's names; None for a run.
      original: the names of these in the file, where wrappers have changed them.
      manifest: what the export that wrote it recorded, if one did.
      approximations: what had to be crossed to read it, reason by name.
      notes: what else is worth knowing, one line each.
    """

    path: Path
    run: str | None = None
    kind: str
    spec: Spec
    leaves: dict[str, LazyTensor]
    tokenizer: Tokenizer | None
    images: ImageFormat | None = None
    step: int = 0
    metrics: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    rules: Rules | None = None
    tensors: Tensors | None = None
    original: Mapping[str, str] = dataclasses.field(default_factory=dict)
    manifest: Mapping[str, Any] | None = None
    approximations: Mapping[str, str] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def num_params(self) -> int:
        """The number of parameters."""
        return sum(leaf.size for leaf in self.leaves.values())


def check_layers(spec: Spec, num_tensors: int, place: Path) -> None:
    """Checks that a number of layers can be meant, before names of all of them are made."""
    if spec.num_layers > num_tensors:
        raise ShapeMismatchError(
            f"{place}: the config says {spec.num_layers} layers, and there are {num_tensors} "
            "tensors; one of them belongs to another model"
        )


def images_of(described: Mapping[str, Any]) -> ImageFormat | None:
    """Returns the image format that a config or manifest describes, or None."""
    found = described.get("images")
    return None if found is None else ImageFormat.from_json(found)


def with_dtype(source: Source, dtype: np.dtype | None) -> Source:
    """Returns a source whose leaves have another dtype; None keeps each as it is.

    Raises:
      DtypeError: a leaf has one that no model here can have.
    """
    dtypes.check_dtypes(source.leaves, dtype)
    return dataclasses.replace(source, leaves=dtypes.as_dtype(source.leaves, dtype))


def trimmed(source: Source) -> tuple[Source, dict[str, Any]]:
    """Returns a source without the embedding rows that no token of its tokenizer reads.

    Returns:
      The source, and what was left out: `rows`, and the digest of each leaf's part.

    Raises:
      UsageError: there is no tokenizer, or nothing to leave out.
    """
    if source.tokenizer is None:
        raise UsageError("--trim-vocab: without a tokenizer, no row is known to be unused")
    rows, keep = source.spec.vocab_size, source.tokenizer.vocab_size
    if keep >= rows:
        raise UsageError(f"--trim-vocab: all {rows} rows stand for tokens; leave it out")
    spec = dataclasses.replace(source.spec, vocab_size=keep)
    now = leaves(spec)
    names = tuple(n for n, leaf in source.leaves.items() if n in now and now[n].shape != leaf.shape)
    lost = {name: dtypes.digest(source.leaves[name].read()[keep:]) for name in names}
    found = dtypes.trimmed(source.leaves, names, keep)
    return dataclasses.replace(source, spec=spec, leaves=found), {
        "rows": rows - keep,
        "sha256": lost,
    }
