"""The script in exported folders; tests/interop/commands/test_verify.py runs it on exports."""

import hashlib
import json
import shutil

import pytest

torch = pytest.importorskip("torch")
from interop.pytorch import modeling_craft, verify_folder  # noqa: E402
from tests.interop.models import flip, random_leaves  # noqa: E402
from tests.interop.proofs import prove, prove_alone  # noqa: E402
from tests.interop.pytorch import reference  # noqa: E402
from tests.interop.pytorch.reference import LMS, PAIRS, ids, saved  # noqa: E402

pytestmark = pytest.mark.torch
SOURCE = ids(31, seed=1)[:1]


def made(folder, known):
    """Writes a folder that proves itself, as an export makes it."""
    saved(folder, known)
    shutil.copy(modeling_craft.__file__, folder / "modeling_craft.py")
    shutil.copy(verify_folder.__file__, folder / "verify.py")
    leaves = random_leaves(known)
    inputs = {"source_BS": SOURCE} if known.name == "seq2seq" else {}
    logits = reference.logits(known, leaves, ids()[:1], **inputs)[0]
    probe = {
        "tolerance": 1e-8,
        "tokens": ids()[0].tolist(),
        "rows": [
            {"position": 32, "ids": list(range(97)), "logits": logits[32].tolist()},
            {"position": 7, "ids": [3, 50], "logits": logits[7, [3, 50]].tolist()},
        ],
        "prompt": [1, 2],
        "greedy": reference.greedy(known, leaves, [1, 2], 4, **inputs),
    }
    if inputs:
        probe["source"] = SOURCE[0].tolist()
    (folder / "probe.json").write_text(json.dumps(probe))
    write_manifest(folder, leaves)
    return folder


def write_manifest(folder, leaves):
    digests = {
        name: {"sha256": hashlib.sha256(leaf.read().tobytes()).hexdigest()}
        for name, leaf in leaves.items()
    }
    (folder / "interop_manifest.json").write_text(json.dumps({"tensors": digests}))


def run(folder, by=prove):
    done = by(folder)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("known", "by"), [(LMS["empty, post-norm, no bias"], prove), (PAIRS["apart"], prove_alone)]
)
def test_a_folder_proves_itself(known, by, tmp_path):
    code, said = run(made(tmp_path / "out", known), by)
    assert code == 0 and "OK: 99 logits agree in float64" in said and "4 greedy tokens" in said


def test_detected_changes(tmp_path):
    folder = made(tmp_path / "out", PAIRS["sinusoidal"])
    probe = json.loads((folder / "probe.json").read_text())
    for change, words in [
        ({"source": [3, *probe["source"][1:]]}, "not the logits"),
        ({"greedy": [probe["greedy"][0] ^ 1, *probe["greedy"][1:]]}, "greedy continuation"),
    ]:
        (folder / "probe.json").write_text(json.dumps(probe | change))
        code, said = run(folder)
        assert code == 1 and words in said
    (folder / "probe.json").write_text(json.dumps(probe))
    flip(folder / "model.safetensors", "source_positions.constant")
    code, said = run(folder)
    assert code == 1 and "1 tensors are not those exported: source_positions.constant" in said
