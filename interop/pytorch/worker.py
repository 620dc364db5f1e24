"""The torch side of a verification, in a process of its own: python worker.py REQUEST_FOLDER.

It may run out of memory or meet an instruction that the CPU does not have, without harm to the
process that asks. The request is `request.json` and `inputs.npz`; the answer is `answer.json` and
`arrays.npz` in the same folder.

The request says: `what` (structure, logits, greedy or images), `container` and `target` (what kind
of model it is), `path`, `model` (the fields of a `ModelSpec`), `dtype`, and perhaps `taps`
(submodules whose outputs are wanted), `prompt` and `new` (a greedy continuation), `names` (of the
tensors in a file, by their clean names), `steps` (of a flow's sampling). The inputs are `tokens`
(B, T) and, for a model that reads a source, `source` (B, S) and `source_mask` (B, S), true for
text; for a flow `x` (B, H, W, C), `t` (B,) and `labels` (B,).
"""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from interop.pytorch import builders
from interop.pytorch.modeling_craft import read_safetensors
from interop.pytorch.nanogpt import NanoGPT

Request = Mapping[str, Any]
Forward = Callable[..., torch.Tensor]
"""Logits (B, T, V) of tokens and, where the model reads one, of a source and its mask."""


def main(folder: Path) -> None:
    """Answers one request."""
    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    load = {
        "hf": _load_hf,
        "craft-torch": _load_craft_torch,
        "nanogpt": _load_nanogpt,
        "torch": _load_stack,
        "craft": _load_stack,
    }
    answer: dict[str, Any] = {}
    arrays: dict[str, np.ndarray] = {}
    model, forward, answer["loading"] = load[request["container"]](request)
    if request["what"] == "structure":
        answer["tensors"] = {name: list(t.shape) for name, t in model.state_dict().items()}
    else:
        model = model.to(getattr(torch, request["dtype"])).eval()
        first, *others = _inputs(folder / "inputs.npz")
        with torch.no_grad():
            with _watched(model, request.get("taps", [])) as states:
                arrays["logits"] = forward(first, *others).numpy()
            arrays |= {f"tap {path}": array for path, array in states.items()}
            if request["what"] == "images":
                _, labels = others
                made = model.generate(labels, noise_BHWC=first, num_steps=request["steps"])
                arrays["images"] = made.numpy()
            source = [array[:1] for array in others]
            prompt, count = request.get("prompt", []), request.get("new", 0)
            answer["greedy"] = _greedy(lambda tokens: forward(tokens, *source), prompt, count)
    np.savez(folder / "arrays.npz", **arrays)
    (folder / "answer.json").write_text(json.dumps(answer), encoding="utf-8")


def _inputs(path: Path) -> list[torch.Tensor]:
    """Returns what a forward takes, in its order."""
    with np.load(path) as inputs:
        if "x" in inputs:
            x, t, labels = (torch.from_numpy(inputs[name]) for name in ("x", "t", "labels"))
            return [x, t, labels.long()]
        found = [torch.from_numpy(inputs["tokens"]).long()]
        if "source" in inputs:
            found.append(torch.from_numpy(inputs["source"]).long())
            found.append(torch.from_numpy(inputs["source_mask"]))
    return found


def _load_hf(request: Request) -> tuple[Any, Forward, dict]:
    # Optional: only Hugging Face folders need it.
    import transformers

    transformers.logging.set_verbosity_error()
    path = request["path"]
    if request["what"] == "structure":
        config = transformers.AutoConfig.from_pretrained(path)
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(config), _no_forward, {}
    model, info = transformers.AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    loading = {name: sorted(map(str, keys)) for name, keys in info.items() if keys}
    return model, lambda tokens: model(tokens, use_cache=False).logits, loading


def _load_craft_torch(request: Request) -> tuple[Any, Forward, dict]:
    # The folder's own file is what its users run.
    sys.dont_write_bytecode = True
    sys.path.insert(0, request["path"])
    import modeling_craft

    file = Path(request["path"]) / "config.json"
    name = json.loads(file.read_text(encoding="utf-8"))["model"]["name"]
    own = {"seq2seq": "CraftForSeq2Seq", "flow": "CraftFlow"}
    cls = getattr(modeling_craft, own.get(name, "CraftForCausalLM"))
    if request["what"] == "structure":
        with torch.device("meta"):
            return cls(modeling_craft.CraftConfig.from_json(file)), _no_forward, {}
    model = cls.from_pretrained(request["path"])
    if name == "flow":
        return model, model, {}
    return model, lambda *inputs: model(*inputs).logits, {}


def _load_nanogpt(request: Request) -> tuple[Any, Forward, dict]:
    spec = request["model"]
    model_args = {
        "n_layer": spec["num_layers"],
        "n_head": spec["num_heads"],
        "n_embd": spec["d_model"],
        "block_size": spec["max_seq_len"],
        "bias": spec["bias"],
        "vocab_size": spec["vocab_size"],
        "dropout": spec["dropout"],
    }
    if request["what"] == "structure":
        with torch.device("meta"):
            return NanoGPT(model_args), _no_forward, {}
    model = NanoGPT(model_args)
    checkpoint = torch.load(request["path"], weights_only=True, map_location="cpu")
    weights = checkpoint.get("model", checkpoint)
    model.load_state_dict(weights, strict=True, assign=True)
    return model, model, {}


def _load_stack(request: Request) -> tuple[Any, Forward, dict]:
    if request["what"] == "structure":
        with torch.device("meta"):
            return builders.build(request["target"], request["model"]), _no_forward, {}
    model = builders.build(request["target"], request["model"]).to(getattr(torch, request["dtype"]))
    found = _state_dict(Path(request["path"]))
    weights = {clean: found[name] for clean, name in request["names"].items()}
    # What a module counts for itself, such as numbers of positions, need not be among the names.
    own = {n: b for n, b in model.named_buffers() if not b.is_floating_point()}
    model.load_state_dict(own | weights, strict=True)
    return model, model, {}


def _state_dict(path: Path) -> Mapping[str, torch.Tensor]:
    """Returns the tensors of a file: all of it, or what trainers call the model."""
    if path.is_dir():
        path /= "pytorch_model.bin"
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    checkpoint = torch.load(path, weights_only=True, map_location="cpu")
    if all(isinstance(value, torch.Tensor) for value in checkpoint.values()):
        return checkpoint
    return checkpoint["model_state_dict" if "model_state_dict" in checkpoint else "model"]


def _no_forward(*inputs: torch.Tensor) -> torch.Tensor:
    raise AssertionError("a model without weights computes nothing")


@contextlib.contextmanager
def _watched(model: torch.nn.Module, paths: list[str]) -> Iterator[dict[str, np.ndarray]]:
    """Keeps the first tensor of what each named submodule puts out last."""
    states: dict[str, np.ndarray] = {}

    def keep(path: str) -> Callable:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            states[path] = first.detach().numpy().copy()

        return hook

    hooks = [model.get_submodule(path).register_forward_hook(keep(path)) for path in paths]
    yield states
    for hook in hooks:
        hook.remove()


def _greedy(forward: Forward, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(forward(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main(Path(sys.argv[1]))
