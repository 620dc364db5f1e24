"""PyTorch's side of the parity tests: a model of each target, in float64."""

import dataclasses
from typing import Any

import torch

from interop.mapping.spec import ModelSpec
from interop.mapping.table import Mapping
from interop.mapping.tensors import Tensors
from interop.pytorch import builders
from interop.pytorch.modeling_craft import CraftConfig, CraftForCausalLM, CraftForSeq2Seq
from interop.pytorch.nanogpt import NanoGPT
from interop.pytorch.tensors import to_torch
from interop.targets.registry import TARGETS


def build(target: str, spec: ModelSpec, leaves: Tensors, **changes: Any) -> torch.nn.Module:
    """Returns the model of a target in float64; `changes` go over its config."""
    model = empty(target, spec, **changes).double().eval()
    weights = {n: to_torch(t.read()).double() for n, t in forward(target, spec, leaves).items()}
    missing, extra = model.load_state_dict(weights, strict=False)
    assert not extra
    assert {n for n in missing if "position_ids" not in n} <= {
        "lm_head.weight",
        "output_projection.weight",
    }
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    return model


def empty(target: str, spec: ModelSpec, **changes: Any) -> torch.nn.Module:
    config = TARGETS[target].write_config(spec) | changes
    container = TARGETS[target].container
    if container == "hf":
        import transformers

        kind, cls = {
            "gpt2": (transformers.GPT2Config, transformers.GPT2LMHeadModel),
            "biogpt": (transformers.BioGptConfig, transformers.BioGptForCausalLM),
            "opt": (transformers.OPTConfig, transformers.OPTForCausalLM),
        }[target]
        # OPT's own attention has a float32 softmax inside.
        attention = "sdpa" if target == "opt" else "eager"
        return cls(kind(**config, pad_token_id=None, attn_implementation=attention))
    if target == "nanogpt":
        return NanoGPT(config)
    if target == "craft-torch":
        cls = CraftForSeq2Seq if spec.num_decoder_layers else CraftForCausalLM
        return cls(CraftConfig(**(config["model"] | changes)))
    return builders.build(target, dataclasses.asdict(spec) | changes)


def forward(target: str, spec: ModelSpec, leaves: Tensors) -> Tensors:
    return rules(target, spec).forward(leaves)


def rules(target: str, spec: ModelSpec) -> Mapping:
    return TARGETS[target].mapping(spec)


def logits(model: torch.nn.Module, inputs: Any) -> torch.Tensor:
    """Returns logits_BTV of any of these models, of ids or of a dict with a source."""
    if not isinstance(inputs, dict):
        inputs = {"tokens": inputs}
    tokens, *source = (torch.tensor(array) for array in inputs.values())
    out = model(tokens, *source)
    if isinstance(out, torch.Tensor):
        return out
    return out[0] if isinstance(out, tuple) else out.logits
