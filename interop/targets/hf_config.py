"""Configs of Hugging Face: names of activations, and settings to refuse."""

from collections.abc import Mapping
from typing import Any

from interop.errors import UnknownArchitectureError

TO_HF = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu", "silu": "silu"}
_FROM_HF = {
    **{hf: ours for ours, hf in TO_HF.items()},
    "gelu_tanh": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python": "gelu",
    "swish": "silu",
}
# Other roundings or polynomials of what `gelu_tanh` computes.
_NEARLY = {"gelu_fast": "gelu_tanh", "gelu_accurate": "gelu_tanh", "quick_gelu": "gelu_tanh"}

# What says nothing about the logits.
HARMLESS = frozenset(
    """
    _attn_implementation_autoset _commit_hash _name_or_path _num_labels architectures
    attn_implementation bad_words_ids begin_suppress_tokens bos_token_id chat_template
    cls_token_id cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample
    dtype early_stopping encoder_no_repeat_ngram_size eos_token_id
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
    gradient_checkpointing id2label init_std initializer_range is_decoder
    keys_to_ignore_at_inference label2id length_penalty mask_token_id max_length min_length
    model_type n_ctx n_special name_or_path no_repeat_ngram_size num_beam_groups num_beams
    num_labels num_return_sequences output_attentions output_hidden_states output_past
    output_scores pad_token_id predict_special_tokens prefix problem_type remove_invalid_values
    repetition_penalty return_dict return_dict_in_generate sep_token_id summary_activation
    summary_first_dropout summary_proj_to_labels summary_type summary_use_proj suppress_tokens
    task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k
    top_p torch_dtype torchscript transformers_version typical_p use_bfloat16 use_cache
    """.split()
)


def check_settings(
    config: Mapping[str, Any],
    read: frozenset[str],
    fixed: Mapping[str, tuple[Any, str | None]],
    crossed: dict[str, str],
) -> None:
    """Checks that a config says nothing that craft_jax does not have.

    Args:
      config: `config.json`.
      read: settings that the caller understands.
      fixed: settings that must have their default, with it and the approximation that crosses them.
      crossed: approximations, reason by name; added to.

    Raises:
      UnknownArchitectureError: it does, and nothing can cross that.
    """
    for name, value in config.items():
        if name in read or name in HARMLESS:
            continue
        default, approx = fixed.get(name, (None, "config"))
        if value == default or (name not in fixed and not value):
            continue
        if approx is None:
            raise UnknownArchitectureError(
                f"config.json has {name}={value!r}; a model of craft_jax has no such thing"
            )
        crossed[approx] = f"{name}={value!r} means nothing to craft_jax"


def activation(config: Mapping[str, Any], name: str, default: str, crossed: dict[str, str]) -> str:
    """Returns craft_jax's name of the activation that a setting names.

    Raises:
      UnknownArchitectureError: craft_jax has no such activation.
    """
    value = config.get(name, default)
    if value in _FROM_HF:
        return _FROM_HF[value]
    if value in _NEARLY:
        crossed["gelu"] = f"{name}={value!r} becomes {_NEARLY[value]}"
        return _NEARLY[value]
    raise UnknownArchitectureError(
        f"config.json has {name}={value!r}; craft_jax has " + ", ".join(_FROM_HF)
    )


def one_rate(config: Mapping[str, Any], rates: Mapping[str, Any], crossed: dict[str, str]) -> float:
    """Returns the one rate of dropout that craft_jax has.

    Args:
      config: `config.json`.
      rates: the settings, and their defaults.
      crossed: approximations; added to where the rates differ.
    """
    values = [config.get(name, default) for name, default in rates.items()]
    if len(set(values)) > 1:
        crossed["dropout"] = (
            f"{', '.join(rates)} are {', '.join(map(str, values))}; craft_jax has one rate, for "
            f"training only, and takes {values[0]}"
        )
    return values[0]
