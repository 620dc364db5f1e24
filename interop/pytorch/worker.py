"""The torch side of a verification, in a process of its own: python worker.py REQUEST_FOLDER.

It may run out of memory or meet an instruction that the CPU does not have, without harm to the
process that asks. The request is `request.json` and `tokens.npy`; the answer is `answer.json` and
`arrays.npz` in the same folder.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from interop.pytorch.nanogpt import NanoGPT


def main(folder: Path) -> None:
    """Answers one request."""
    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    load = {"hf": _load_hf, "craft-torch": _load_craft, "nanogpt": _load_nanogpt}
    answer: dict[str, Any] = {}
    arrays: dict[str, np.ndarray] = {}
    model, forward, answer["loading"] = load[request["container"]](request)
    if request["what"] == "structure":
        answer["tensors"] = {name: list(t.shape) for name, t in model.state_dict().items()}
    else:
        model = model.to(getattr(torch, request["dtype"])).eval()
        tokens = torch.from_numpy(np.load(folder / "tokens.npy")).long()
        with torch.no_grad():
            states = _watch(model, request.get("taps", []))
            arrays["logits"] = forward(tokens).numpy()
            arrays |= {f"tap {path}": array for path, array in states.items()}
            answer["greedy"] = _greedy(forward, request.get("prompt", []), request.get("new", 0))
    np.savez(folder / "arrays.npz", **arrays)
    (folder / "answer.json").write_text(json.dumps(answer), encoding="utf-8")


def _load_hf(request: dict) -> tuple[Any, Callable, dict]:
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


def _load_craft(request: dict) -> tuple[Any, Callable, dict]:
    # The folder's own file is what its users run.
    sys.dont_write_bytecode = True
    sys.path.insert(0, request["path"])
    from modeling_craft import CraftConfig, CraftForCausalLM

    if request["what"] == "structure":
        with torch.device("meta"):
            config = CraftConfig.from_json(Path(request["path"]) / "config.json")
            return CraftForCausalLM(config), _no_forward, {}
    model = CraftForCausalLM.from_pretrained(request["path"])
    return model, lambda tokens: model(tokens).logits, {}


def _load_nanogpt(request: dict) -> tuple[Any, Callable, dict]:
    if request["what"] == "structure":
        with torch.device("meta"):
            return NanoGPT(request["model_args"]), _no_forward, {}
    model = NanoGPT(request["model_args"])
    checkpoint = torch.load(request["path"], weights_only=True, map_location="cpu")
    weights = checkpoint.get("model", checkpoint)
    model.load_state_dict(weights, strict=True, assign=True)
    return model, model, {}


def _no_forward(tokens: torch.Tensor) -> torch.Tensor:
    raise AssertionError("a model without weights computes nothing")


def _watch(model: torch.nn.Module, paths: list[str]) -> dict[str, np.ndarray]:
    """Keeps the first tensor that each named submodule puts out next."""
    states: dict[str, np.ndarray] = {}

    def keep(path: str) -> Callable:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            states.setdefault(path, first.detach().numpy().copy())

        return hook

    for path in paths:
        model.get_submodule(path).register_forward_hook(keep(path))
    return states


def _greedy(forward: Callable, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(forward(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main(Path(sys.argv[1]))
