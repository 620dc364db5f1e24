"""PyTorch's side of the parity tests: a model of each target, in float64."""

from typing import Any

import torch

from interop.mapping import Mapping
from interop.pytorch.modeling_craft import CraftConfig, CraftForCausalLM
from interop.pytorch.nanogpt import NanoGPT
from interop.pytorch.tensors import to_torch
from interop.spec import ModelSpec
from interop.targets import TARGETS
from interop.tensors import Tensors


def build(target: str, spec: ModelSpec, leaves: Tensors, **changes: Any) -> torch.nn.Module:
    """Returns the model of a target in float64; `changes` go over its config."""
    config = TARGETS[target].write_config(spec) | changes
    if target == "gpt2":
        import transformers

        kind = transformers.GPT2Config(**config, attn_implementation="eager")
        model = transformers.GPT2LMHeadModel(kind)
    elif target == "nanogpt":
        model = NanoGPT(config)
    else:
        model = CraftForCausalLM(CraftConfig(**(config["model"] | changes)))
    model = model.double().eval()
    weights = {n: to_torch(t.read()).double() for n, t in forward(target, spec, leaves).items()}
    missing, extra = model.load_state_dict(weights, strict=False)
    assert not extra and set(missing) <= {"lm_head.weight"}
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    return model


def forward(target: str, spec: ModelSpec, leaves: Tensors) -> Tensors:
    return rules(target, spec).forward(leaves)


def rules(target: str, spec: ModelSpec) -> Mapping:
    return TARGETS[target].mapping(spec)


def logits(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Returns logits_BTV of any of these models."""
    out = model(tokens)
    if isinstance(out, torch.Tensor):
        return out
    return out[0] if isinstance(out, tuple) else out.logits
