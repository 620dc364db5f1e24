"""An opened model: its spec, and its leaves by the names of craft_jax, read one by one."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from craft_jax.data.images.format import ImageFormat
from craft_jax.data.tokenizers import Tokenizer
from craft_jax.errors import UsageError
from interop.errors import ShapeMismatchError
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
    """Options for reading a source.

    Attributes:
      kind: `auto`, or the name of a target; `hf` for a Hugging Face folder, `craft` for a file or
        folder of Craft.
      num_heads: for tensors without a config.
      config: a config for tensors without one: a file, or JSON that begins with `{`.
      strip_prefix, ignore_keys: see `keys.cleaned`.
      allow_approx: approximations, see `Allowed`.
      allow_globals: names that a pickle may mention; they become inert stubs.
      drop_zero_bias: read biases that are all zero as no biases.
      weights: `average` or `last`, for a run whose optimizer keeps an average.
      checkpoint: `last`, `best` or a step, of a run.
      recorded: the part of the manifest that reading back needs before it is written.
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
    checkpoint: str = "last"
    recorded: Mapping[str, Any] | None = None

    def __post_init__(self):
        if self.kind not in GROUPS and self.kind not in TARGETS:
            kinds = ", ".join((*GROUPS, *TARGETS))
            raise UsageError(f"`kind={self.kind}` is not one of {kinds}")
        if self.weights not in WEIGHTS:
            raise UsageError(f"`weights={self.weights}` is not one of {', '.join(WEIGHTS)}")
        Allowed.of(self.allow_approx)

    @property
    def targets(self) -> tuple[Target, ...]:
        """The targets whose form the source may have."""
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
                raise UsageError(f"`config={self.config}`: no JSON: {error}") from None
        if not Path(self.config).is_file():
            raise UsageError(f"`config={self.config}`: no such file")
        return hugging_face.read_json(Path(self.config))

    def check_unused(self, place: str) -> None:
        """Checks that no option for foreign sources is given with a run.

        Raises:
          UsageError: one is.
        """
        default = Options()
        given = [
            f"`{field.name}`"
            for field in dataclasses.fields(self)
            if field.name not in ("allow_approx", "weights", "checkpoint")
            and getattr(self, field.name) != getattr(default, field.name)
        ]
        if given:
            raise UsageError(
                f"{', '.join(given)}: {place} is a run of craft_jax, whose own config and metadata "
                "apply; leave it out"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """An opened model.

    Attributes:
      path: the folder or file.
      run: the name of the run that the weights come from, if known.
      kind: `craft_jax`, or the name of the target whose form it has.
      spec: the architecture.
      leaves: its parameters by the names of craft_jax, read lazily.
      tokenizer: or None.
      images: the format of its training images; None for text, or if unknown.
      step: number of updates, if known.
      metrics: of the last evaluation, if known.
      rules: between leaves and `tensors`; None for a run.
      tensors: by the target's names; None for a run.
      original: clean name to the name in the file.
      manifest: of the export that wrote it, or None.
      approximations: limits crossed to read it, reason by name.
      notes: remarks for the user, one line each.
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
    """Checks the number of layers before the names of all are computed."""
    if spec.num_layers > num_tensors:
        raise ShapeMismatchError(
            f"{place}: its config has {spec.num_layers} layers, and there are {num_tensors} "
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
        raise UsageError("`trim_vocab`: without a tokenizer, no row is known to be unused")
    rows, keep = source.spec.vocab_size, source.tokenizer.vocab_size
    if keep >= rows:
        raise UsageError(f"`trim_vocab`: all {rows} rows stand for tokens; leave it out")
    spec = dataclasses.replace(source.spec, vocab_size=keep)
    now = leaves(spec)
    names = tuple(n for n, leaf in source.leaves.items() if n in now and now[n].shape != leaf.shape)
    lost = {name: dtypes.digest(source.leaves[name].read()[keep:]) for name in names}
    found = dtypes.trimmed(source.leaves, names, keep)
    return dataclasses.replace(source, spec=spec, leaves=found), {
        "rows": rows - keep,
        "sha256": lost,
    }
