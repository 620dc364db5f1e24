"""gpt2: Hugging Face's `GPT2LMHeadModel`.

Its dense layers are `Conv1D`, whose weights are (in, out) as ours are: nothing is transposed.
Query, key and value are three blocks of columns of one matrix. It cannot be without biases; a model
that has none gets explicit zeros.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from interop.mapping.ops import Concat, Zeros
from interop.mapping.spec import ModelSpec
from interop.mapping.table import Alias, Buffer, Rule, Table, Tap, rule
from interop.targets.base import (
    FINAL_NORM,
    LANGUAGE_MODEL,
    LEARNED,
    NO_CROSS,
    NO_CROSS_AFTER_NORM,
    NO_HEAD_BIAS,
    PRE_NORM,
    SCALE_FOLD,
    Reading,
    Target,
    count_layers,
    demand,
    need_heads,
)
from interop.targets.hf_config import TO_HF, activation, check_settings, one_rate

# Settings that must have their default: (default, approximation that crosses it).
_FIXED: dict[str, tuple[Any, str | None]] = {
    "scale_attn_weights": (True, None),
    "scale_attn_by_inverse_layer_idx": (False, None),
    "add_cross_attention": (False, None),
    "is_encoder_decoder": (False, None),
    "reorder_and_upcast_attn": (False, "upcast"),
    "chunk_size_feed_forward": (0, None),
    "pruned_heads": ({}, None),
    "quantization_config": (None, None),
}
_RATES = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
_READ = frozenset(
    """
    activation_function attn_pdrop embd_pdrop layer_norm_epsilon n_embd n_head n_inner n_layer
    n_positions resid_pdrop tie_word_embeddings vocab_size
    """.split()
)


def guessed_sizes(shapes: Mapping[str, tuple[int, ...]], num_heads: int | None) -> dict[str, Any]:
    """Returns the sizes that follow from tensors of GPT-2, by GPT-2's names of settings."""
    vocab_size, width = shapes["transformer.wte.weight"]
    return {
        "vocab_size": vocab_size,
        "n_embd": width,
        "n_head": need_heads(width, num_heads),
        "n_layer": count_layers(shapes, "transformer.h."),
    }


def is_causal_mask(array: np.ndarray) -> bool:
    """Returns whether an array (1, 1, n, n) is the causal mask of ones in GPT-2 files."""
    if array.ndim != 4 or array.shape[:2] != (1, 1) or array.shape[2] != array.shape[3]:
        return False
    n = array.shape[2]
    return all(
        bool(np.all(row[: i + 1] == 1)) and not np.any(row[i + 1 :])
        for i, row in zip(range(n), array[0, 0], strict=True)
    )


def _is_masked_bias(array: np.ndarray) -> bool:
    return array.size == 1 and float(array.reshape(())) in (-1e4, -1e9)


GPT2_LIMITS = (
    LANGUAGE_MODEL,
    PRE_NORM,
    FINAL_NORM,
    LEARNED,
    SCALE_FOLD,
    NO_CROSS,
    NO_CROSS_AFTER_NORM,
    NO_HEAD_BIAS,
)
"""The limits of all targets with GPT-2's architecture."""


class GPT2(Target):
    """Hugging Face GPT2LMHeadModel."""

    name = "gpt2"
    summary = "Hugging Face GPT2LMHeadModel"
    container = "hf"
    anchor = "transformer.h.0.attn.c_attn.weight"
    optional_prefix = "transformer."
    model_type = "gpt2"
    tied = ("lm_head.weight", "transformer.wte.weight")
    limits = GPT2_LIMITS

    def table(self, spec: ModelSpec) -> Table:
        d, f = spec.d_model, spec.d_ff
        ours, theirs = "blocks.{i}.", "transformer.h.{i}."

        def norm(source: str, target: str, has_bias: bool = spec.has_norm_bias) -> list[Rule]:
            weight, name = rule(f"{source}.scale", f"{target}.weight"), f"{source}.bias"
            return [weight, bias([name], f"{target}.bias", d, f"{source}.scale", has_bias)]

        def dense(sources: list[str], target: str, width: int) -> list[Rule]:
            join = (Concat(1),) if len(sources) > 1 else ()
            kernels = [f"{source}.kernel" for source in sources]
            biases = [f"{source}.bias" for source in sources]
            weight = rule(kernels, f"{target}.weight", *join)
            return [weight, bias(biases, f"{target}.bias", width, kernels[0], spec.bias)]

        def bias(sources: list[str], target: str, width: int, like: str, has_bias: bool) -> Rule:
            if not has_bias:
                return rule((), target, Zeros((width,)), like=like)
            return rule(sources, target, *((Concat(0),) if len(sources) > 1 else ()))

        qkv = [f"{ours}attn.{name}" for name in ("query", "key", "value")]
        rules = [
            rule("token_embedding.embedding", "transformer.wte.weight"),
            rule("position_embedding.embedding", "transformer.wpe.weight"),
            *norm(f"{ours}attn_norm", f"{theirs}ln_1"),
            *dense(qkv, f"{theirs}attn.c_attn", 3 * d),
            *dense([f"{ours}attn.out"], f"{theirs}attn.c_proj", d),
            *norm(f"{ours}mlp_norm", f"{theirs}ln_2"),
            *dense([f"{ours}mlp.up"], f"{theirs}mlp.c_fc", f),
            *dense([f"{ours}mlp.down"], f"{theirs}mlp.c_proj", d),
            *norm("final_norm", "transformer.ln_f", spec.has_final_norm_bias),
        ]
        if not spec.tie_embeddings:
            rules.append(rule("head.embedding", "lm_head.weight"))
        aliases = (
            (Alias("lm_head.weight", "transformer.wte.weight"),) if spec.tie_embeddings else ()
        )
        return Table(
            rules=tuple(rules),
            aliases=aliases,
            buffers=(
                Buffer(f"{theirs}attn.bias", is_causal_mask, "a causal mask of ones and zeros"),
                Buffer(f"{theirs}attn.masked_bias", _is_masked_bias, "-10000 or -1e9"),
            ),
            taps=(
                Tap("token_embedding", "transformer.wte", "the token embedding's rows"),
                Tap("position_embedding", "transformer.wpe", "the position embedding's rows"),
                Tap(
                    f"{ours}attn_norm",
                    f"{theirs}ln_1",
                    "layer_norm_epsilon, ln_1.weight, ln_1.bias",
                ),
                Tap(f"{ours}attn", f"{theirs}attn", "n_head, c_attn (order of q, k, v), c_proj"),
                Tap(
                    f"{ours}mlp_norm", f"{theirs}ln_2", "layer_norm_epsilon, ln_2.weight, ln_2.bias"
                ),
                Tap(f"{ours}mlp", f"{theirs}mlp", "activation_function, c_fc, c_proj"),
                Tap("final_norm", "transformer.ln_f", "layer_norm_epsilon, ln_f.weight, ln_f.bias"),
            ),
        )

    def write_config(self, spec: ModelSpec) -> dict[str, Any]:
        return {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "vocab_size": spec.vocab_size,
            "n_positions": spec.max_seq_len,
            "n_embd": spec.d_model,
            "n_layer": spec.num_layers,
            "n_head": spec.num_heads,
            "n_inner": spec.d_ff,
            "activation_function": TO_HF[spec.activation],
            "resid_pdrop": spec.dropout,
            "embd_pdrop": spec.dropout,
            "attn_pdrop": spec.dropout,
            "layer_norm_epsilon": spec.norm_eps,
            "initializer_range": 0.02,
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "reorder_and_upcast_attn": False,
            "tie_word_embeddings": spec.tie_embeddings,
            "use_cache": True,
        }

    def recognises(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        rows, columns = shapes.get(self.anchor, (0, 0))
        return columns == 3 * rows > 0

    def guess_config(
        self, shapes: Mapping[str, tuple[int, ...]], num_heads: int | None
    ) -> dict[str, Any]:
        return guessed_sizes(shapes, num_heads) | {
            "n_positions": shapes["transformer.wpe.weight"][0],
            "n_inner": shapes["transformer.h.0.mlp.c_fc.weight"][1],
            "tie_word_embeddings": "lm_head.weight" not in shapes,
        }

    def read_config(self, config: Mapping[str, Any]) -> Reading:
        sizes = demand(config, "config.json", "vocab_size", "n_embd", "n_layer", "n_head")
        vocab_size, d_model, num_layers, num_heads = sizes
        crossed: dict[str, str] = {}
        check_settings(config, _READ, _FIXED, crossed)
        spec = ModelSpec(
            vocab_size=vocab_size,
            num_layers=num_layers,
            num_heads=num_heads,
            d_model=d_model,
            d_ff=config.get("n_inner") or 4 * d_model,
            max_seq_len=config.get("n_positions", config.get("n_ctx", 1024)),
            dropout=one_rate(config, _RATES, crossed),
            activation=activation(config, "activation_function", "gelu_new", crossed),
            bias=True,
            tie_embeddings=config.get("tie_word_embeddings", True),
            norm_eps=config.get("layer_norm_epsilon", 1e-5),
        )
        return Reading(spec, crossed)
