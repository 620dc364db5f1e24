"""Checks that what this folder loads as is the model that was exported: python verify.py.

It compares the bytes of every tensor with the digests in `interop_manifest.json`, loads the folder
in float64 as any program would, computes the logits of the tokens in `probe.json`, and compares
them with those that craft_jax computed; of a flow, velocities and images. Needs torch and, for
Hugging Face folders, transformers. Exits with 1 if anything differs.
"""

import hashlib
import json
import math
import os
import sys
from pathlib import Path

# Some CPUs announce instructions that they do not carry out.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")

import torch

FOLDER = Path(__file__).resolve().parent


def load(source=None):
    """Returns a function from token ids (1, T) to logits (T, V), both tensors.

    A model that reads a source, a list of ids, reads this one.
    """
    config = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))
    if config["model_type"] == "craft":
        sys.dont_write_bytecode = True
        sys.path.insert(0, str(FOLDER))
        from modeling_craft import CraftForCausalLM, CraftForSeq2Seq

        if source is not None:
            model = CraftForSeq2Seq.from_pretrained(FOLDER).double()
            ids = torch.tensor([source])
            return lambda tokens: model(tokens, ids, torch.ones_like(ids, dtype=bool)).logits[0]
        model = CraftForCausalLM.from_pretrained(FOLDER).double()
        return lambda tokens: model(tokens).logits[0]
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(FOLDER, output_loading_info=True)
    wrong = {name: list(keys) for name, keys in info.items() if keys}
    if wrong:
        sys.exit(f"FAILED: the weights do not fill the model: {wrong}")
    model = model.double().eval()
    return lambda tokens: model(tokens, use_cache=False).logits[0]


def changed_tensors():
    """Returns the names of tensors whose bytes are not those that were exported."""
    manifest = json.loads((FOLDER / "interop_manifest.json").read_text(encoding="utf-8"))
    found = {}
    for path in sorted(FOLDER.glob("*.safetensors")):
        data = path.read_bytes()
        begin = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:begin])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            start, end = (begin + offset for offset in entry["data_offsets"])
            found[name] = hashlib.sha256(data[start:end]).hexdigest()
    return [name for name, t in manifest["tensors"].items() if found.get(name) != t["sha256"]]


def check_flow(probe):
    """Compares velocities, and images made of the same noise, and says how it went."""
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(FOLDER))
    from modeling_craft import CraftFlow

    model = CraftFlow.from_pretrained(FOLDER).double()
    places = torch.arange(math.prod(probe["shape"]), dtype=torch.float64)
    x = (1.5 * torch.sin(12.9898 * places + 0.5)).reshape(probe["shape"])
    t, labels = torch.tensor(probe["t"], dtype=torch.float64), torch.tensor(probe["labels"])
    with torch.no_grad():
        made = {
            "velocities": model(x, t, labels),
            "images": model.generate(labels, noise_BHWC=x, num_steps=probe["steps"]),
        }
    worst = {}
    for name, whole in made.items():
        want = torch.tensor(probe[name], dtype=torch.float64)
        ratio = (whole.reshape(-1)[probe["at"]] - want).abs() / want.abs().clamp(min=1.0)
        worst[name] = float("inf") if bool(ratio.isnan().any()) else float(ratio.max())
        if worst[name] > probe["tolerance"]:
            sys.exit(
                f"FAILED: these are not the {name} of the model that was exported: they differ by "
                f"{worst[name]:.3g} x max(1, |x|); {probe['tolerance']:g} is allowed. The weights, "
                "the config or the code that loads them has changed."
            )
    print(
        f"OK: {len(probe['at'])} velocities agree in float64 (largest difference "
        f"{worst['velocities']:.3g} x max(1, |v|)), and images after {probe['steps']} steps "
        f"({worst['images']:.3g})"
    )


def main():
    """Compares, and says how it went."""
    if changed := changed_tensors():
        sys.exit(
            f"FAILED: {len(changed)} tensors are not those exported: {', '.join(changed[:10])}"
        )
    probe = json.loads((FOLDER / "probe.json").read_text(encoding="utf-8"))
    if "velocities" in probe:
        return check_flow(probe)
    with torch.no_grad():
        forward = load(probe.get("source"))
        logits = forward(torch.tensor([probe["tokens"]]))
        worst, where, count = 0.0, None, 0
        for row in probe["rows"]:
            want = torch.tensor(row["logits"], dtype=torch.float64)
            got = logits[row["position"], row["ids"]]
            ratio = (got - want).abs() / want.abs().clamp(min=1.0)
            largest = float("inf") if bool(ratio.isnan().any()) else float(ratio.max())
            count += len(row["ids"])
            if largest > worst:
                worst, where = largest, (row["position"], row["ids"][int(ratio.argmax())])
        tokens = list(probe["prompt"])
        while len(tokens) < len(probe["prompt"]) + len(probe["greedy"]):
            tokens.append(int(forward(torch.tensor([tokens]))[-1].argmax()))
    if worst > probe["tolerance"]:
        sys.exit(
            "FAILED: these are not the logits of the model that was exported: at position "
            f"{where[0]}, token id {where[1]}, they differ by {worst:.3g} x max(1, |logit|); "
            f"{probe['tolerance']:g} is allowed. The weights, the config or the code that loads "
            "them has changed."
        )
    if tokens[len(probe["prompt"]) :] != probe["greedy"]:
        sys.exit(f"FAILED: the greedy continuation is {tokens}, not {probe['greedy']}")
    print(
        f"OK: {count} logits agree in float64 (largest difference {worst:.3g} x max(1, |logit|)), "
        f"and {len(probe['greedy'])} greedy tokens"
    )


if __name__ == "__main__":
    main()
