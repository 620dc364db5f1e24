"""The probe: reference outputs in an exported folder, to test any program that loads it.

`probe.json` holds token ids, float64 logits that craft_jax computed for them, and a greedy
continuation; for a flow, velocities and images for noise from a formula. `verify.py` beside it
compares them with the outputs of PyTorch. Needs JAX.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from interop.commands.plan import Plan
from interop.errors import CorruptFileError, ParityError
from interop.files import hugging_face
from interop.sources.live import Reference
from interop.sources.source import Source

FILE = "probe.json"
TOLERANCE = 1e-8
"""Times max(1, |logit|): above float64 rounding, below the effect of all mistakes tried."""

_SCRIPT = Path(__file__).parents[1] / "pytorch" / "verify_folder.py"
_SEED = 20260101
_MAX_TOKENS = 256
_NUM_POSITIONS = 6
_IDS_PER_POSITION = 32
_PROMPT, _NEW = 16, 8
_NUMBERS, _STEPS = 512, 20


def write(planned: Plan, place: Path) -> None:
    """Writes `probe.json` and `verify.py` into an unfinished output folder."""
    reference = Reference(planned.spec, planned.source.leaves)
    make = compute if planned.spec.is_of_tokens else compute_of_flow
    probe = make(reference, planned.source)
    (place / FILE).write_text(json.dumps(probe) + "\n", encoding="utf-8")
    (place / "verify.py").write_bytes(_SCRIPT.read_bytes())


def compute(reference: Reference, source: Source) -> dict[str, Any]:
    """Returns the probe of a model: deterministic, and plain JSON.

    The last position has the logits of every id, so that every row of the head is tested; some
    other positions have those of a few ids.
    """
    vocab_size, context = source.spec.vocab_size, source.spec.max_seq_len
    rng = np.random.default_rng(_SEED)
    tokens = rng.integers(0, vocab_size, min(context, _MAX_TOKENS))
    tokens[0], tokens[-1] = 0, vocab_size - 1
    inputs = {"tokens": tokens[None].astype(np.int32)}
    reads = {}
    if source.spec.num_decoder_layers:
        reads["source"] = rng.integers(0, vocab_size, min(context, _MAX_TOKENS)).tolist()
        inputs |= _read(reads)
    logits_TV = reference.logits(inputs)[0]
    last = len(tokens) - 1
    chosen = sorted({0, last, *rng.integers(0, len(tokens), _NUM_POSITIONS - 2).tolist()})
    rows = []
    for position in chosen:
        some = rng.choice(vocab_size, min(vocab_size, _IDS_PER_POSITION), replace=False)
        ids = list(range(vocab_size)) if position == last else sorted(some.tolist())
        rows.append({"position": position, "ids": ids, "logits": logits_TV[position, ids].tolist()})
    prompt = tokens[: max(1, min(_PROMPT, context // 2))].tolist()
    return {
        "about": "float64 logits of craft_jax; python verify.py compares them",
        "tolerance": TOLERANCE,
        **reads,
        "tokens": tokens.tolist(),
        "rows": rows,
        "prompt": prompt,
        "greedy": reference.greedy(prompt, _NEW, inputs),
    }


def compute_of_flow(reference: Reference, source: Source) -> dict[str, Any]:
    """Returns the probe of a flow: deterministic, and plain JSON.

    Two images, one with the last label and one without, and some of their numbers.
    """
    spec = source.spec
    shape = [2, spec.height, spec.width, spec.channels]
    rng = np.random.default_rng(_SEED)
    size = math.prod(shape)
    probe = {
        "about": "float64 velocities and images of craft_jax; python verify.py compares them",
        "tolerance": TOLERANCE,
        "shape": shape,
        "t": [0.25, 0.75],
        "labels": [max(0, spec.num_classes - 1), spec.num_classes],
        "at": sorted(rng.choice(size, min(size, _NUMBERS), replace=False).tolist()),
        "steps": _STEPS,
    }
    return probe | _flow_numbers(reference, probe)


def _flow_numbers(reference: Reference, probe: dict[str, Any]) -> dict[str, list[float]]:
    """Returns the numbers that a flow's probe records."""
    x = 1.5 * np.sin(12.9898 * np.arange(math.prod(probe["shape"])) + 0.5)
    inputs = {
        "x": x.reshape(probe["shape"]),
        "t": np.array(probe["t"], np.float64),
        "labels": np.array(probe["labels"], np.int32),
    }
    velocities = reference.logits(inputs).reshape(-1)[probe["at"]]
    images = reference.images(inputs, probe["steps"]).reshape(-1)[probe["at"]]
    return {"velocities": velocities.tolist(), "images": images.tolist()}


def _check_of_flow(source: Source, file: Path) -> int:
    """Checks the probe of a flow; see `check`."""
    probe = hugging_face.read_json(file)
    spec = source.spec
    try:
        wanted = {name: np.array(probe[name], np.float64) for name in ("velocities", "images")}
        tolerance, size = float(probe["tolerance"]), math.prod(probe["shape"])
        is_sound = (
            list(probe["shape"]) == [len(probe["t"]), spec.height, spec.width, spec.channels]
            and len(probe["labels"]) == len(probe["t"])
            and all(0 <= label <= spec.num_classes for label in probe["labels"])
            and 0 < len(probe["at"]) == len(wanted["velocities"]) == len(wanted["images"])
            and all(0 <= place < size for place in probe["at"])
            and 1 <= probe["steps"] <= 1000
        )
        if not is_sound:
            raise ValueError("its numbers are not those of this model's images")
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptFileError(f"{file} is no probe: {error!r}") from error
    found = _flow_numbers(Reference(spec, source.leaves), probe)
    worst = max(
        float(np.max(np.abs(np.array(found[name]) - want) / np.maximum(1, np.abs(want))))
        for name, want in wanted.items()
    )
    if not worst <= tolerance:
        raise ParityError(
            f"{source.path}: the weights do not give the velocities and images that its probe.json "
            f"records: they differ by {worst:.3g}, more than {tolerance:g}; somebody changed one "
            "of them; `probe=none` imports them as they are"
        )
    return 2 * len(probe["at"])


def _read(probe: dict[str, Any]) -> dict[str, np.ndarray]:
    """Returns the encoder inputs of a probe; empty for a language model."""
    if "source" not in probe:
        return {}
    source_BS = np.asarray(probe["source"], np.int32)[None]
    return {"source": source_BS, "source_mask": np.ones(source_BS.shape, bool)}


def check(source: Source, file: Path) -> int:
    """Compares the logits that a probe records with those of a model.

    Returns:
      The number of logits that agreed.

    Raises:
      CorruptFileError: the probe cannot be read.
      ParityError: they differ.
    """
    if not source.spec.is_of_tokens:
        return _check_of_flow(source, file)
    probe = hugging_face.read_json(file)
    try:
        tokens = np.asarray(probe["tokens"], np.int32)
        rows = [
            (int(r["position"]), list(r["ids"]), np.asarray(r["logits"])) for r in probe["rows"]
        ]
        tolerance = float(probe["tolerance"])
        reads = _read(probe)
        ids = np.concatenate([tokens, reads.get("source", tokens[None])[0]])
        if not rows or not ((ids >= 0) & (ids < source.spec.vocab_size)).all():
            raise ValueError("no logits, or ids outside of the vocabulary")
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptFileError(f"{file} is no probe: {error!r}") from error
    reference = Reference(source.spec, source.leaves)
    logits_TV = reference.logits({"tokens": tokens[None], **reads})[0]
    worst = max(
        float(np.max(np.abs(logits_TV[p, ids] - want) / np.maximum(1, np.abs(want))))
        for p, ids, want in rows
    )
    if not worst <= tolerance:
        raise ParityError(
            f"{source.path}: the weights do not give the logits that its probe.json records: they "
            f"differ by {worst:.3g} x max(1, |logit|), more than {tolerance:g}; somebody changed "
            "one of them; `probe=none` imports them as they are"
        )
    return sum(len(ids) for _, ids, _ in rows)
