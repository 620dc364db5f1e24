"""gpt2: Hugging Face's `GPT2LMHeadModel`.

Its dense layers are `Conv1D`, whose weights are (in, out) as ours are: nothing is transposed.
Query, key and value are three blocks of columns of one matrix. It cannot be without biases; a model
that has none gets explicit zeros.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from interop.errors import UnknownArchitectureError
from interop.mapping import Alias, Buffer, Rule, Table, Tap, rule
from interop.ops import Concat, Zeros
from interop.spec import ModelSpec
from interop.targets.base import Reading, Target, count_layers, demand, need_heads

_TO_HF = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu", "silu": "silu"}
_FROM_HF = {
    **{hf: ours for ours, hf in _TO_HF.items()},
    "gelu_pytorch_tanh": "gelu_tanh",
    "swish": "silu",
}
# Other roundings or polynomials of what `gelu_tanh` computes.
_NEARLY = {"gelu_fast": "gelu_tanh", "gelu_accurate": "gelu_tanh", "quick_gelu": "gelu_tanh"}

# What must have its default, since craft_jax has no other; attribute by (default, approximation).
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
# What says nothing about the logits.
_HARMLESS = frozenset(
    """
    _attn_implementation_autoset _commit_hash _name_or_path architectures attn_implementation
    bad_words_ids begin_suppress_tokens bos_token_id chat_template cross_attention_hidden_size
    decoder_start_token_id diversity_penalty do_sample dtype early_stopping
    encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id gradient_checkpointing id2label initializer_range
    is_decoder keys_to_ignore_at_inference label2id length_penalty max_length min_length model_type
    n_ctx n_special name_or_path no_repeat_ngram_size num_beam_groups num_beams num_labels
    num_return_sequences output_attentions output_hidden_states output_past output_scores
    pad_token_id predict_special_tokens prefix problem_type remove_invalid_values
    repetition_penalty return_dict return_dict_in_generate sep_token_id summary_activation
    summary_first_dropout summary_proj_to_labels summary_type summary_use_proj suppress_tokens
    task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p
    torch_dtype torchscript transformers_version typical_p use_bfloat16 use_cache
    """.split()
)
_READ = frozenset(
    """
    activation_function attn_pdrop embd_pdrop layer_norm_epsilon n_embd n_head n_inner n_layer
    n_positions resid_pdrop tie_word_embeddings vocab_size
    """.split()
)


def guessed_sizes(shapes: Mapping[str, tuple[int, ...]], num_heads: int | None) -> dict[str, Any]:
    """Returns the sizes that tensors of GPT-2's names tell, under GPT-2's names of settings."""
    vocab_size, width = shapes["transformer.wte.weight"]
    return {
        "vocab_size": vocab_size,
        "n_embd": width,
        "n_head": need_heads(width, num_heads),
        "n_layer": count_layers(shapes, "transformer.h."),
    }


def is_causal_mask(array: np.ndarray) -> bool:
    """Whether an array (1, 1, n, n) is the lower triangle of ones that GPT-2 files carry."""
    if array.ndim != 4 or array.shape[:2] != (1, 1) or array.shape[2] != array.shape[3]:
        return False
    n = array.shape[2]
    return all(
        bool(np.all(row[: i + 1] == 1)) and not np.any(row[i + 1 :])
        for i, row in zip(range(n), array[0, 0], strict=True)
    )


def _is_masked_bias(array: np.ndarray) -> bool:
    return array.size == 1 and float(array.reshape(())) in (-1e4, -1e9)


class GPT2(Target):
    """Hugging Face GPT2LMHeadModel."""

    name = "gpt2"
    summary = "Hugging Face GPT2LMHeadModel"
    container = "hf"
    anchor = "transformer.h.0.attn.c_attn.weight"
    optional_prefix = "transformer."
    model_type = "gpt2"

    def table(self, spec: ModelSpec) -> Table:
        d, f = spec.d_model, spec.d_ff
        ours, theirs = "blocks.{i}.", "transformer.h.{i}."

        def norm(source: str, target: str) -> list[Rule]:
            weight = rule(f"{source}.scale", f"{target}.weight")
            return [weight, bias([f"{source}.bias"], f"{target}.bias", d, f"{source}.scale")]

        def dense(sources: list[str], target: str, width: int) -> list[Rule]:
            join = (Concat(1),) if len(sources) > 1 else ()
            kernels = [f"{source}.kernel" for source in sources]
            biases = [f"{source}.bias" for source in sources]
            weight = rule(kernels, f"{target}.weight", *join)
            return [weight, bias(biases, f"{target}.bias", width, kernels[0])]

        def bias(sources: list[str], target: str, width: int, like: str) -> Rule:
            if not spec.bias:
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
            *norm("final_norm", "transformer.ln_f"),
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
            "activation_function": _TO_HF[spec.activation],
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
        for name, value in config.items():
            if name in _READ or name in _HARMLESS:
                continue
            default, approx = _FIXED.get(name, (None, "config"))
            if value == default or (name not in _FIXED and not value):
                continue
            if approx is None:
                raise UnknownArchitectureError(
                    f"config.json has {name}={value!r}; a GPT of craft_jax has no such thing"
                )
            crossed[approx] = f"{name}={value!r} means nothing to craft_jax"
        activation = config.get("activation_function", "gelu_new")
        if activation in _NEARLY:
            crossed["gelu"] = f"activation_function={activation!r} becomes {_NEARLY[activation]}"
        elif activation not in _FROM_HF:
            raise UnknownArchitectureError(
                f"config.json has activation_function={activation!r}; craft_jax has "
                + ", ".join(_FROM_HF)
            )
        rates = [config.get(name, 0.1) for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop")]
        if len(set(rates)) > 1:
            crossed["dropout"] = (
                f"resid_pdrop, embd_pdrop, attn_pdrop are {', '.join(map(str, rates))}; craft_jax "
                f"has one rate, for training only, and takes {rates[0]}"
            )
        spec = ModelSpec(
            vocab_size=vocab_size,
            num_layers=num_layers,
            num_heads=num_heads,
            d_model=d_model,
            d_ff=config.get("n_inner") or 4 * d_model,
            max_seq_len=config.get("n_positions", config.get("n_ctx", 1024)),
            dropout=rates[0],
            activation=_FROM_HF.get(activation) or _NEARLY[activation],
            bias=True,
            tie_embeddings=config.get("tie_word_embeddings", True),
            norm_eps=config.get("layer_norm_epsilon", 1e-5),
        )
        return Reading(spec, crossed)
