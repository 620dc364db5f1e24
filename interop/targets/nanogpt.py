"""nanogpt: the checkpoint file of nanoGPT, which its `sample.py` reads.

Its dense layers are `nn.Linear`, (out, in): all matrices are transposed. Epsilon, activation and
width of the MLP are constants of its code.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from interop.mapping.ops import Concat, Tie, Transpose
from interop.mapping.spec import ModelSpec
from interop.mapping.table import Buffer, Rule, Table, Tap, rule
from interop.mapping.tensors import Tensors
from interop.targets import hf_config
from interop.targets.base import (
    ONE_EPS,
    Facts,
    Limit,
    Reading,
    Target,
    demand,
    parallel_biases,
)
from interop.targets.gpt2 import GPT2_LIMITS, guessed_sizes, is_causal_mask

_SIZES = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
SETTINGS = (*_SIZES, "bias", "dropout", "activation", "tie_word_embeddings")
"""Those of nanoGPT's `GPTConfig`, and two that its code decides."""

_ACTIVATION_NOTE = (
    "activation: the file does not say; exact GELU is taken, as in nanoGPT since June 2023. Older "
    """files and build-nanogpt have the tanh form: `config='{"activation": "gelu_tanh"}'`"""
)


_UNTIED_NOTE = (
    "activation: the file does not say; its head is not its embedding, as in minGPT, so the tanh "
    """form of GELU is taken: `config='{"activation": "gelu"}'` for the exact one"""
)


class NanoGPT(Target):
    """One checkpoint file that nanoGPT's sample.py reads."""

    name = "nanogpt"
    summary = "one checkpoint file that nanoGPT's sample.py reads"
    container = "nanogpt"
    anchor = "transformer.h.0.attn.c_attn.weight"
    optional_prefix = "transformer."
    tied = ("lm_head.weight", "transformer.wte.weight")
    limits = (
        *GPT2_LIMITS,
        *parallel_biases(),
        Limit(
            "activation",
            lambda spec: spec.activation in ("gelu", "gelu_tanh"),
            "nanoGPT has the exact GELU",
        ),
        Limit(
            "activation",
            lambda spec: spec.activation != "gelu_tanh",
            "nanoGPT has the exact GELU",
            approx="gelu",
            becomes=lambda spec: dataclasses.replace(spec, activation="gelu"),
        ),
        ONE_EPS,
        Limit(
            "d_ff",
            lambda spec: spec.d_ff == 4 * spec.d_model,
            "nanoGPT's MLP is four times as wide as the model",
        ),
        Limit(
            "tie_embeddings",
            lambda spec: spec.tie_embeddings,
            "nanoGPT's head is always its token embedding",
        ),
    )

    def table(self, spec: ModelSpec) -> Table:
        ours, theirs = "blocks.{i}.", "transformer.h.{i}."
        qkv = [f"{ours}attn.{name}" for name in ("query", "key", "value")]

        def dense(sources: list[str], target: str) -> list[Rule]:
            join = bool(len(sources) > 1)
            kernels, biases = ([f"{s}.{leaf}" for s in sources] for leaf in ("kernel", "bias"))
            weight = rule(kernels, f"{target}.weight", *((Concat(1),) if join else ()), Transpose())
            bias = rule(biases, f"{target}.bias", *((Concat(0),) if join else ()))
            return [weight, bias] if spec.bias else [weight]

        def norm(source: str, target: str) -> list[Rule]:
            weight = rule(f"{source}.scale", f"{target}.weight")
            return [weight, rule(f"{source}.bias", f"{target}.bias")] if spec.bias else [weight]

        embedding, head = "transformer.wte.weight", "lm_head.weight"
        if spec.tie_embeddings:
            above = [rule("token_embedding.embedding", (embedding, head), Tie())]
        else:  # minGPT's.
            above = [rule("token_embedding.embedding", embedding), rule("head.embedding", head)]
        return Table(
            rules=(
                *above,
                rule("position_embedding.embedding", "transformer.wpe.weight"),
                *norm(f"{ours}attn_norm", f"{theirs}ln_1"),
                *dense(qkv, f"{theirs}attn.c_attn"),
                *dense([f"{ours}attn.out"], f"{theirs}attn.c_proj"),
                *norm(f"{ours}mlp_norm", f"{theirs}ln_2"),
                *dense([f"{ours}mlp.up"], f"{theirs}mlp.c_fc"),
                *dense([f"{ours}mlp.down"], f"{theirs}mlp.c_proj"),
                *norm("final_norm", "transformer.ln_f"),
            ),
            buffers=(
                Buffer(f"{theirs}attn.bias", is_causal_mask, "a causal mask of ones and zeros"),
            ),
            taps=(
                Tap("token_embedding", "transformer.wte", "the token embedding's rows"),
                Tap("position_embedding", "transformer.wpe", "the position embedding's rows"),
                Tap(f"{ours}attn_norm", f"{theirs}ln_1", "ln_1.weight, ln_1.bias, epsilon"),
                Tap(f"{ours}attn", f"{theirs}attn", "n_head, c_attn (order of q, k, v), c_proj"),
                Tap(f"{ours}mlp_norm", f"{theirs}ln_2", "ln_2.weight, ln_2.bias, epsilon"),
                Tap(f"{ours}mlp", f"{theirs}mlp", "the activation, c_fc, c_proj"),
                Tap("final_norm", "transformer.ln_f", "ln_f.weight, ln_f.bias, epsilon"),
            ),
        )

    def write_config(self, spec: ModelSpec) -> dict[str, Any]:
        return {
            "n_layer": spec.num_layers,
            "n_head": spec.num_heads,
            "n_embd": spec.d_model,
            "block_size": spec.max_seq_len,
            "bias": spec.bias,
            "vocab_size": spec.vocab_size,
            "dropout": spec.dropout,
        }

    def complete_config(
        self, config: Mapping[str, Any] | None, tensors: Tensors, num_heads: int | None
    ) -> Mapping[str, Any]:
        if config is not None and not set(_SIZES) <= config.keys():
            shapes = {name: tensor.shape for name, tensor in tensors.items()}
            config = self.guess_config(shapes, config.get("n_head", num_heads)) | dict(config)
        return super().complete_config(config, tensors, num_heads)

    def unknown_settings(self, config: Mapping[str, Any]) -> list[str]:
        return [name for name in config if name not in SETTINGS]

    def config_in(self, around: Mapping[str, Any]) -> Mapping[str, Any] | None:
        described = around.get("model_args")
        return described if isinstance(described, Mapping) else None

    def contents(self, tensors: Mapping[str, Any], spec: ModelSpec, facts: Facts) -> Any:
        return {
            "model": tensors,
            "model_args": self.write_config(spec),
            "iter_num": facts.step,
            "best_val_loss": 1e9 if facts.val_loss is None else facts.val_loss,
            "config": {},
        }

    def recognises(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        rows, columns = shapes.get(self.anchor, (0, 0))
        return rows == 3 * columns > 0

    def guess_config(
        self, shapes: Mapping[str, tuple[int, ...]], num_heads: int | None
    ) -> dict[str, Any]:
        return guessed_sizes(shapes, num_heads) | {
            "block_size": shapes["transformer.wpe.weight"][0],
            "bias": "transformer.ln_f.bias" in shapes,
        }

    def read_config(self, config: Mapping[str, Any]) -> Reading:
        sizes = demand(config, "model_args", *_SIZES)
        num_layers, num_heads, d_model, max_seq_len, vocab_size = sizes
        crossed: dict[str, str] = {}
        is_tied = config.get("tie_word_embeddings", True)
        note = _ACTIVATION_NOTE if is_tied else _UNTIED_NOTE
        hf_config.check_settings(config, frozenset(SETTINGS), {}, crossed)
        spec = ModelSpec(
            vocab_size=vocab_size,
            num_layers=num_layers,
            num_heads=num_heads,
            d_model=d_model,
            d_ff=4 * d_model,
            max_seq_len=max_seq_len,
            dropout=config.get("dropout", 0.0),
            activation=hf_config.activation(
                config, "activation", "gelu" if is_tied else "gelu_new", crossed
            ),
            bias=config.get("bias", True),
            tie_embeddings=is_tied,
            norm_eps=1e-5,
        )
        return Reading(spec, crossed, () if "activation" in config else (note,))
