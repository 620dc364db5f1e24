"""Verification: tests whether two models, in whatever form, are the same.

`structure` compares the architectures, and the names and shapes of the weights with PyTorch's own
module; `bits` compares every bit of every leaf; `logits` computes in float64 on both sides, at full
context, and names the first submodule that differs; `generate` compares greedy tokens and the
tokenizers. For a flow the last two compare velocities, and images from the same noise. PyTorch runs
in a process of its own; JAX is imported only if needed.
"""

import argparse
import dataclasses
import functools
import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from craft_jax.errors import FAILED_CHECK, OK, UsageError
from interop.commands import Result, add_models, torch_process
from interop.commands.diff import describe, differences
from interop.commands.reading import add_reading, reading_options
from interop.errors import InteropError, listed
from interop.mapping import dtypes, folds
from interop.mapping.spec import FlowSpec, ModelSpec, Spec
from interop.mapping.table import Tap
from interop.sources import opening, source
from interop.sources.source import CRAFT, Options, Source
from interop.targets.registry import TARGETS

LEVELS = ("structure", "bits", "logits", "generate")
TOLERANCE = 1e-10
"""Times max(1, |logit|), in float64. Measured: equal models 4e-15, the smallest mistake 5e-4."""

_SEED = 20260101
_MAX_LENGTH = 2048
_NEW = 64
_STEPS = 20
_IMAGE_TOLERANCE = 1e-8
"""Of a whole sampling, for numbers of about [-1, 1]."""
_TEXTS = (
    "The quick brown fox jumps over the lazy dog.\n",
    "def f(x):\n\treturn  x ** 2  # squares\n\n",
    "naïve café, 東京, Ωμέγα, \U0001f642\r\n",
    "<|endoftext|> is text here\n",
    "    indented    and   spaced   \n\n\n",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """The result of a comparison.

    Attributes:
      passed: whether the models are the same at this level.
      level: the level of the comparison.
      summary: one line.
      problems: one line for each difference.
      figures: the measured values.
    """

    passed: bool
    level: str
    summary: str
    problems: tuple[str, ...] = ()
    figures: dict[str, Any] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Returns the report as plain JSON."""
        return dataclasses.asdict(self)


def verify(
    a: Any,
    b: Any,
    level: str = "bits",
    *,
    seq_len: int | None = None,
    options: Options | None = None,
) -> Report:
    """Compares two models.

    Args:
      a, b: runs, checkpoints, or anything else that `open_source` opens.
      level: structure, bits, logits or generate.
      seq_len: tokens of the context for logits; None for all of it, up to 2048.
      options: how to read foreign sources.

    Raises:
      UsageError: there is no such level.
      InteropError: one of them cannot be read.
    """
    if level not in LEVELS:
        raise UsageError(f"`level={level}` is not one of {', '.join(LEVELS)}")
    first, second = _open(a, options), _open(b, options)
    first, second, notes = _as_exported(first, second)
    return compare(first, second, level, seq_len=seq_len, notes=notes)


def _open(model: Any, options: Options | None) -> Source:
    return model if isinstance(model, Source) else opening.open_source(model, options)


def _as_exported(a: Source, b: Source) -> tuple[Source, Source, list[str]]:
    """Applies to each model the conversions that the other's manifest records."""
    notes: list[str] = []

    def convert(model: Source, manifest: Any) -> Source:
        if not manifest:
            return model
        dtype = manifest.get("dtype", "keep")
        if crossed := {folds.CROSS, folds.SCALE} & set(manifest.get("approximations", ())):
            model = _folded(model, crossed)
            notes.append(f"compared after the same {', '.join(sorted(crossed))}")
        tokens = model.tokenizer.vocab_size if model.tokenizer else model.spec.vocab_size
        if manifest.get("trimmed") and model.spec.vocab_size > tokens:
            model, _ = source.trimmed(model)
            notes.append("compared without the rows that `trim_vocab` left out")
        wanted = dtypes.named(dtype)
        if wanted is not None and any(leaf.dtype != wanted for leaf in model.leaves.values()):
            notes.append(f"compared after the same `dtype={dtype}`")
            model = dataclasses.replace(model, leaves=dtypes.as_dtype(model.leaves, wanted))
        return model

    return convert(a, b.manifest), convert(b, a.manifest), notes


def _folded(model: Source, names: set[str]) -> Source:
    spec = model.spec
    if folds.CROSS in names and spec.cross_attention in folds.CONSTANT:
        spec = folds.without_cross_attention(spec)
    if folds.SCALE in names and spec.embedding_scale:
        spec = dataclasses.replace(spec, embedding_scale=False, tie_embeddings=False)
    found = folds.towards(model.spec, model.leaves, spec)
    return dataclasses.replace(model, spec=spec, leaves=found)


def compare(
    a: Source,
    b: Source,
    level: str,
    *,
    seq_len: int | None = None,
    notes: Sequence[str] = (),
) -> Report:
    """Compares two models that are open; see `verify`."""
    check = {
        "structure": _structure,
        "bits": _bits,
        "logits": functools.partial(_logits, seq_len=seq_len),
        "generate": _generate,
    }[level]
    problems, figures = check(a, b)
    if notes:
        figures["notes"] = list(notes)
    names = f"{a.path} and {b.path}"
    summary = (
        f"{names} are the same: {figures.pop('summary')}"
        if not problems
        else f"{names} differ: {problems[0]}"
        + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else "")
    )
    figures.pop("summary", None)
    return Report(
        passed=not problems,
        level=level,
        summary=summary,
        problems=tuple(problems),
        figures=figures,
    )


Checked = tuple[list[str], dict[str, Any]]


# Structure.


def _structure(a: Source, b: Source) -> Checked:
    problems = a.spec.differences(b.spec)
    for model in (a, b):
        if model.kind != CRAFT:
            problems += _strict_load(model)
    return problems, {"summary": f"the same architecture, {a.num_params:,} parameters"}


def _strict_load(model: Source) -> list[str]:
    """Compares names and shapes with those of PyTorch's own module, built without memory."""
    assert model.tensors is not None and model.rules is not None
    if not torch_process.can_run(model):
        return []
    answer, _ = torch_process.ask(model, {"what": "structure"})
    wanted = {name: tuple(shape) for name, shape in answer["tensors"].items()}
    extra = {one.name for one in (*model.rules.aliases, *model.rules.buffers)}
    missing = [name for name in wanted if name not in model.tensors and name not in extra]
    beyond = [name for name in model.tensors if name not in wanted and name not in extra]
    shapes = [
        f"{name} is {model.tensors[name].shape} in the file and {shape} in PyTorch"
        for name, shape in wanted.items()
        if name in model.tensors and model.tensors[name].shape != shape
    ]
    lines = [f"{name} is in PyTorch's module, not in the file" for name in missing]
    return lines + [f"{name} is in the file, not in PyTorch's module" for name in beyond] + shapes


# Bits.


def _bits(a: Source, b: Source) -> Checked:
    problems = a.spec.differences(b.spec)
    rows = differences(a, b)
    problems += [describe(row, a, b) for row in rows]
    said = f"{len(a.leaves)} tensors, {a.num_params:,} parameters, bit for bit"
    return problems, {"summary": said, "tensors": len(a.leaves), "different": len(rows)}


# Logits.


def _logits(a: Source, b: Source, seq_len: int | None = None) -> Checked:
    if _differ_in_size(a.spec, b.spec):
        return a.spec.differences(b.spec), {}
    if not a.spec.is_of_tokens:
        inputs = _points(a.spec)
        return _compared(a, b, inputs, "velocities", f"of {len(inputs['x'])} images")
    length = min(seq_len or _MAX_LENGTH, a.spec.max_seq_len)
    return _compared(a, b, _inputs(a.spec, length), "logits", f"at {length} positions")


def _differ_in_size(a: Spec, b: Spec) -> bool:
    """Returns whether two models cannot compute the same inputs."""
    if not (a.is_of_tokens and b.is_of_tokens):
        return bool(a.differences(b))
    sizes = ("vocab_size", "max_seq_len", "num_decoder_layers")
    return any(getattr(a, name) != getattr(b, name) for name in sizes)


def _compared(
    a: Source, b: Source, inputs: dict[str, np.ndarray], what: str, condition: str
) -> Checked:
    """Compares the outputs of two models, `what` (logits or velocities), for the same inputs."""
    taps = _taps(a, b)
    try:
        x_BTV, x_states = _run(a, inputs, taps)
        y_BTV, y_states = _run(b, inputs, taps)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error).lower():
            raise
        raise UsageError(
            f"float64 {what} {condition} do not fit into memory; give a smaller `seq_len`"
        ) from error
    ratio = np.abs(x_BTV - y_BTV) / np.maximum(1, np.maximum(np.abs(x_BTV), np.abs(y_BTV)))
    worst = float(np.max(ratio)) if np.isfinite(ratio).all() else float("inf")
    agree = float(np.mean(x_BTV.argmax(-1) == y_BTV.argmax(-1)))
    unit = {"logits": "|logit|", "velocities": "|velocity|"}[what]
    figures = {
        "largest": worst,
        "tolerance": TOLERANCE,
        "summary": f"float64 {what} {condition}, largest difference {worst:.3g} x max(1, {unit})",
    }
    if what == "logits":
        figures |= {"tokens": list(inputs["tokens"].shape), "same_top_token": agree}
    if worst <= TOLERANCE:
        return [], figures
    where = np.unravel_index(int(np.nan_to_num(ratio, nan=np.inf).argmax()), ratio.shape)
    place, more = f"row {where[1]}, column {where[2]}", ""
    if what == "logits":
        place = f"position {int(where[1])}, token id {int(where[2])}"
        more = f", and {agree:.1%} of the top tokens agree"
    problems = [
        f"float64 {what} differ by {worst:.3g} x max(1, {unit}), first of all at {place}; "
        f"{TOLERANCE:g} is allowed{more}",
        _first_difference(taps, x_states, y_states),
    ]
    return problems, figures


def _points(spec: FlowSpec) -> dict[str, np.ndarray]:
    """Returns points on the way to three images: with the first label, the last one, and none."""
    rng = np.random.default_rng(_SEED)
    x_BHWC = rng.normal(size=(3, spec.height, spec.width, spec.channels))
    labels_B = np.array([0, max(0, spec.num_classes - 1), spec.num_classes], np.int32)
    return {"x": x_BHWC, "t": np.array([0.0, 0.37, 1.0]), "labels": labels_B}


def _inputs(spec: ModelSpec, length: int) -> dict[str, np.ndarray]:
    """Returns two rows of ids, the least and the largest among them, and encoder inputs."""
    rng = np.random.default_rng(_SEED)
    tokens_BT = rng.integers(0, spec.vocab_size, (2, length), np.int32)
    tokens_BT[0, 0], tokens_BT[-1, -1] = 0, spec.vocab_size - 1
    if not spec.num_decoder_layers:
        return {"tokens": tokens_BT}
    source_BS = rng.integers(0, spec.vocab_size, (2, length), np.int32)
    mask_BS = np.ones(source_BS.shape, bool)
    mask_BS[1, (length + 1) // 2 :] = False
    return {"tokens": tokens_BT, "source": source_BS, "source_mask": mask_BS}


def _taps(a: Source, b: Source) -> tuple[Tap, ...]:
    """Returns the submodules whose outputs both models expose, in the order of the forward."""
    places = [
        {tap.source: tap for tap in TARGETS[model.kind].mapping(model.spec).taps}
        for model in (a, b)
        if model.kind != CRAFT
    ] or [{tap.source: tap for tap in TARGETS["craft-torch"].mapping(a.spec).taps}]
    return tuple(tap for name, tap in places[0].items() if all(name in p for p in places))


def _run(
    model: Source, inputs: dict[str, np.ndarray], taps: tuple[Tap, ...]
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Returns float64 logits, and the states at the taps."""
    if model.kind == CRAFT:
        reference = _live().Reference(model.spec, model.leaves)
        states = reference.states(inputs, tuple(tap.source for tap in taps))
        return reference.logits(inputs), [states[tap.source] for tap in taps]
    own = {tap.source: tap.target for tap in TARGETS[model.kind].mapping(model.spec).taps}
    paths = [own[tap.source] for tap in taps]
    request = {"what": "logits", "dtype": "float64", "taps": paths}
    answer, arrays = torch_process.ask(model, request, inputs)
    if answer["loading"]:
        raise InteropError(f"{model.path} does not fill PyTorch's model: {answer['loading']}")
    return arrays["logits"], [arrays[f"tap {path}"] for path in paths]


def _first_difference(taps: tuple[Tap, ...], a: list[np.ndarray], b: list[np.ndarray]) -> str:
    for tap, x, y in zip(taps, a, b, strict=True):
        # A table of positions may put out (T, D) or (1, T, D).
        gap = (
            float(np.max(np.abs(np.squeeze(x) - np.squeeze(y))))
            if np.squeeze(x).shape == np.squeeze(y).shape
            else float("inf")
        )
        if not gap <= TOLERANCE * max(1.0, float(np.max(np.abs(x)))):
            return (
                f"the first submodule that differs is {tap.source} ({tap.target}), by {gap:.3g}; "
                f"look at {tap.causes}"
            )
    return "all blocks agree, but the logits differ: look at the head"


def _live() -> Any:
    return importlib.import_module("interop.sources.live")


# Generate.


def _generate(a: Source, b: Source) -> Checked:
    if not (a.spec.is_of_tokens and b.spec.is_of_tokens):
        return _same_images(a, b)
    problems = _tokenizer_problems(a, b)
    context = min(a.spec.max_seq_len, b.spec.max_seq_len)
    inputs = _inputs(a.spec, max(1, min(16, context // 2)))
    prompt = inputs["tokens"][0].tolist()
    count = min(_NEW, context - len(prompt))
    x, y = (_greedy(model, prompt, count, inputs) for model in (a, b))
    if x != y:
        first = next((i for i, (s, t) in enumerate(zip(x, y, strict=False)) if s != t), 0)
        problems.append(f"greedy tokens differ from number {first} on: {x[first:]} and {y[first:]}")
    both = a.tokenizer is not None and b.tokenizer is not None
    tokenizer = "the same tokenizer" if both else "no two tokenizers to compare"
    return problems, {"summary": f"{count} greedy tokens, and {tokenizer}", "greedy": x}


def _same_images(a: Source, b: Source) -> Checked:
    if problems := a.spec.differences(b.spec):
        return problems, {}
    inputs = _points(a.spec)
    x_BHWC, y_BHWC = (_images(model, inputs) for model in (a, b))
    largest = float(np.max(np.abs(x_BHWC - y_BHWC)))
    figures = {
        "largest": largest,
        "tolerance": _IMAGE_TOLERANCE,
        "summary": f"{len(x_BHWC)} images of the same noise in {_STEPS} steps, largest difference "
        f"{largest:.3g}",
    }
    if largest <= _IMAGE_TOLERANCE:
        return [], figures
    problem = f"images of the same noise differ by {largest:.3g} after {_STEPS} steps; "
    return [problem + f"{_IMAGE_TOLERANCE:g} is allowed"], figures


def _images(model: Source, inputs: dict[str, np.ndarray]) -> np.ndarray:
    if model.kind == CRAFT:
        return _live().Reference(model.spec, model.leaves).images(inputs, _STEPS)
    request = {"what": "images", "dtype": "float64", "steps": _STEPS}
    return torch_process.ask(model, request, inputs)[1]["images"]


def _greedy(
    model: Source, prompt: list[int], count: int, inputs: dict[str, np.ndarray]
) -> list[int]:
    if model.kind == CRAFT:
        return _live().Reference(model.spec, model.leaves).greedy(prompt, count, inputs)
    request = {"what": "greedy", "dtype": "float64", "prompt": prompt, "new": count}
    return torch_process.ask(model, request, inputs)[0]["greedy"]


def _tokenizer_problems(a: Source, b: Source) -> list[str]:
    if a.tokenizer is None or b.tokenizer is None:
        return []
    sizes = [(model.tokenizer.vocab_size, model.tokenizer.end_id) for model in (a, b)]
    problems = []
    if sizes[0] != sizes[1]:
        problems.append(f"the tokenizers differ in (size, id of the end): {sizes[0]}, {sizes[1]}")
    for text in _TEXTS:
        known = "".join(c for c in text if c not in a.tokenizer.unknown_characters(text))
        known = "".join(c for c in known if c not in b.tokenizer.unknown_characters(known))
        x, y = (model.tokenizer.encode(known).tolist() for model in (a, b))
        if x != y:
            problems.append(
                f"the tokenizers differ: {known!r} is {listed(map(str, x))} and "
                f"{listed(map(str, y))}"
            )
        elif a.tokenizer.decode(x) != b.tokenizer.decode(x):
            problems.append(f"the tokenizers decode the ids of {known!r} to different texts")
    return problems


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    add_models(parser, "a", "b")
    add = parser.add_argument
    add("--level", default="bits", help="structure, bits (default), logits or generate")
    add("--seq-len", type=int, help="tokens of context for logits (default: all, up to 2048)")
    add_reading(parser)


def run(args: argparse.Namespace) -> Result:
    """Runs the command."""
    report = verify(args.a, args.b, args.level, seq_len=args.seq_len, options=reading_options(args))
    word = "OK" if report.passed else "FAILED"
    lines = [f"{word}: {report.summary}", *_first(report.problems)]
    notes = tuple(report.figures.get("notes", ()))
    return Result(report.to_json(), lines, notes, OK if report.passed else FAILED_CHECK)


def _first(problems: Sequence[str], limit: int = 10) -> list[str]:
    more = [f"  and {len(problems) - limit} more"] if len(problems) > limit else []
    return [f"  {problem}" for problem in problems[1:limit]] + more
