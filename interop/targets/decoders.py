"""biogpt and opt: Hugging Face's decoders with query, key and value apart.

Their tables of positions begin with two rows that no token reads. BioGPT multiplies embedded tokens
by sqrt(d_model), if its config says so; OPT can have its layer norms after the sums.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from interop.errors import UnknownArchitectureError
from interop.mapping.ops import OffsetRows
from interop.mapping.spec import ModelSpec
from interop.mapping.table import Alias, Rule, Table, Tap, rule
from interop.targets.base import (
    FINAL_NORM,
    LANGUAGE_MODEL,
    LEARNED,
    NO_CROSS,
    NO_CROSS_AFTER_NORM,
    NO_HEAD_BIAS,
    ONE_EPS,
    PRE_NORM,
    SCALE_FOLD,
    Limit,
    Reading,
    Target,
    count_layers,
    demand,
    need_heads,
)
from interop.targets.hf_config import TO_HF, activation, check_settings, one_rate
from interop.targets.rules import Layout, head

_OFFSET = 2
_EPS = 1e-5  # torch's default: neither library's code reads another from its config.
_BLOCK = Layout(
    attn_norm="self_attn_layer_norm",
    mlp_norm="final_layer_norm",
    up="fc1",
    down="fc2",
    projections=("q_proj", "k_proj", "v_proj"),
    demands_norm_bias=True,
)
_SIZES = "vocab_size hidden_size num_hidden_layers num_attention_heads".split()


@dataclasses.dataclass(frozen=True)
class _Names:
    """Where the parts of a model stand."""

    base: str
    final_norm: str
    head: str


def _table(spec: ModelSpec, names: _Names, block: Layout) -> Table:
    ours, theirs = "blocks.{i}.", f"{names.base}.layers.{{i}}."
    embedding = f"{names.base}.embed_tokens"
    embed, *above = head(
        spec,
        "token_embedding.embedding",
        f"{embedding}.weight",
        names.head,
        repeats_tied=False,
    )
    rules: list[Rule] = [
        embed,
        rule(
            "position_embedding.embedding",
            f"{names.base}.embed_positions.weight",
            OffsetRows(_OFFSET),
        ),
        *block.block(ours, theirs, spec, has_cross=False),
    ]
    taps = [Tap("position_embedding", f"{names.base}.embed_positions", "the rows of positions")]
    if not spec.embedding_scale:
        taps.insert(0, Tap("token_embedding", embedding, "the token embedding's rows"))
    taps += block.taps(ours, theirs, has_cross=False)
    if spec.final_norm:
        final = f"{names.base}.{names.final_norm}"
        rules += block.norm("final_norm", final, spec, spec.has_final_norm_bias)
        taps.append(Tap("final_norm", final, "weight or bias of the last layer norm"))
    tied = (Alias(f"{names.head}.weight", f"{embedding}.weight"),) if spec.tie_embeddings else ()
    return Table(rules=(*rules, *above), aliases=tied, taps=tuple(taps))


def _guessed(
    shapes: Mapping[str, tuple[int, ...]], names: _Names, num_heads: int | None
) -> dict[str, Any]:
    vocab_size, width = shapes[f"{names.base}.embed_tokens.weight"]
    return {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "num_hidden_layers": count_layers(shapes, f"{names.base}.layers."),
        "num_attention_heads": need_heads(width, num_heads),
        "max_position_embeddings": shapes[f"{names.base}.embed_positions.weight"][0] - _OFFSET,
        "tie_word_embeddings": f"{names.head}.weight" not in shapes,
    }


class BioGPT(Target):
    """Hugging Face BioGptForCausalLM."""

    name = "biogpt"
    summary = "Hugging Face BioGptForCausalLM: embedded tokens times sqrt(d_model)"
    container = "hf"
    anchor = "biogpt.layers.0.self_attn.q_proj.weight"
    optional_prefix = "biogpt."
    model_type = "biogpt"
    tied = ("output_projection.weight", "biogpt.embed_tokens.weight")
    limits = (
        LANGUAGE_MODEL,
        PRE_NORM,
        FINAL_NORM,
        LEARNED,
        NO_CROSS,
        NO_CROSS_AFTER_NORM,
        NO_HEAD_BIAS,
        ONE_EPS,
    )
    _names = _Names("biogpt", "layer_norm", "output_projection")
    _block = dataclasses.replace(_BLOCK, demands_dense_bias=True)
    _rates = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    _read = frozenset(
        [
            *_SIZES,
            *_rates,
            "intermediate_size hidden_act activation_dropout max_position_embeddings",
            "layer_norm_eps scale_embedding tie_word_embeddings",
        ]
    )

    def table(self, spec: ModelSpec) -> Table:
        return _table(spec, self._names, self._block)

    def write_config(self, spec: ModelSpec) -> dict[str, Any]:
        return {
            "model_type": "biogpt",
            "architectures": ["BioGptForCausalLM"],
            "vocab_size": spec.vocab_size,
            "hidden_size": spec.d_model,
            "num_hidden_layers": spec.num_layers,
            "num_attention_heads": spec.num_heads,
            "intermediate_size": spec.d_ff,
            "hidden_act": TO_HF[spec.activation],
            "hidden_dropout_prob": spec.dropout,
            "attention_probs_dropout_prob": spec.dropout,
            "activation_dropout": spec.dropout if spec.name == "transformer" else 0.0,
            "layerdrop": 0.0,
            "max_position_embeddings": spec.max_seq_len,
            "initializer_range": 0.02,
            "layer_norm_eps": spec.norm_eps,
            "scale_embedding": spec.embedding_scale,
            "tie_word_embeddings": spec.tie_embeddings,
            "use_cache": True,
        }

    def guess_config(
        self, shapes: Mapping[str, tuple[int, ...]], num_heads: int | None
    ) -> dict[str, Any]:
        return _guessed(shapes, self._names, num_heads) | {
            "intermediate_size": shapes["biogpt.layers.0.fc1.weight"][0],
        }

    def read_config(self, config: Mapping[str, Any]) -> Reading:
        vocab_size, d_model, num_layers, num_heads = demand(config, "config.json", *_SIZES)
        crossed: dict[str, str] = {}
        rates: dict[str, str] = {}  # OPT's own defaults differ, and matter in training only.
        known = frozenset(word for names in self._read for word in names.split())
        check_settings(config, known, {"layerdrop": (0.0, "dropout")}, crossed)
        spec = ModelSpec.simplest(
            vocab_size=vocab_size,
            num_layers=num_layers,
            num_heads=num_heads,
            d_model=d_model,
            d_ff=config.get("intermediate_size", 4096),
            max_seq_len=config.get("max_position_embeddings", 1024),
            dropout=one_rate(config, self._rates, rates),
            activation=activation(config, "hidden_act", "gelu", crossed),
            bias=True,
            tie_embeddings=config.get("tie_word_embeddings", True),
            embedding_scale=config.get("scale_embedding", True),
            norm_eps=_EPS,
        )
        return Reading(spec, crossed, tuple(rates.values()))


class OPT(Target):
    """Hugging Face OPTForCausalLM."""

    name = "opt"
    summary = "Hugging Face OPTForCausalLM: also with layer norms after the sums"
    container = "hf"
    anchor = "model.decoder.layers.0.self_attn.q_proj.weight"
    optional_prefix = "model."
    model_type = "opt"
    tied = ("lm_head.weight", "model.decoder.embed_tokens.weight")
    limits = (
        LANGUAGE_MODEL,
        Limit(
            "final_norm",
            lambda spec: not spec.final_norm or spec.norm_first,
            "with layer norms after the sums, it has none at the end",
        ),
        LEARNED,
        SCALE_FOLD,
        NO_CROSS,
        NO_CROSS_AFTER_NORM,
        NO_HEAD_BIAS,
        ONE_EPS,
    )
    _names = _Names("model.decoder", "final_layer_norm", "lm_head")
    _rates = {"dropout": 0.1, "attention_dropout": 0.0}
    _fixed = {
        "layerdrop": (0.0, "dropout"),
        "activation_dropout": (0.0, "dropout"),
        "layer_norm_elementwise_affine": (True, None),
    }
    _read = frozenset(
        [
            *_SIZES,
            *_rates,
            *"ffn_dim activation_function max_position_embeddings do_layer_norm_before".split(),
            *"enable_bias word_embed_proj_dim tie_word_embeddings".split(),
            "_remove_final_layer_norm",
        ]
    )

    def table(self, spec: ModelSpec) -> Table:
        return _table(spec, self._names, _BLOCK)

    def write_config(self, spec: ModelSpec) -> dict[str, Any]:
        return {
            "model_type": "opt",
            "architectures": ["OPTForCausalLM"],
            "vocab_size": spec.vocab_size,
            "hidden_size": spec.d_model,
            "num_hidden_layers": spec.num_layers,
            "num_attention_heads": spec.num_heads,
            "ffn_dim": spec.d_ff,
            "activation_function": TO_HF[spec.activation],
            "dropout": spec.dropout,
            "attention_dropout": spec.dropout,
            "layerdrop": 0.0,
            "max_position_embeddings": spec.max_seq_len,
            "do_layer_norm_before": spec.norm_first,
            "_remove_final_layer_norm": not spec.final_norm,
            "enable_bias": spec.bias,
            "layer_norm_elementwise_affine": True,
            "word_embed_proj_dim": spec.d_model,
            "init_std": 0.02,
            "tie_word_embeddings": spec.tie_embeddings,
            "use_cache": True,
        }

    def guess_config(
        self, shapes: Mapping[str, tuple[int, ...]], num_heads: int | None
    ) -> dict[str, Any]:
        first, base = "model.decoder.layers.0.", "model.decoder."
        is_pre_norm = f"{base}final_layer_norm.weight" in shapes
        return _guessed(shapes, self._names, num_heads) | {
            "ffn_dim": shapes[f"{first}fc1.weight"][0],
            "enable_bias": f"{first}fc1.bias" in shapes,
            "do_layer_norm_before": is_pre_norm,
        }

    def read_config(self, config: Mapping[str, Any]) -> Reading:
        vocab_size, d_model, num_layers, num_heads = demand(config, "config.json", *_SIZES)
        crossed: dict[str, str] = {}
        rates: dict[str, str] = {}  # OPT's own defaults differ, and matter in training only.
        check_settings(config, self._read, self._fixed, crossed)
        if config.get("word_embed_proj_dim") not in (None, d_model):
            raise UnknownArchitectureError(
                f"config.json has word_embed_proj_dim={config['word_embed_proj_dim']!r} and "
                f"hidden_size={d_model!r}; a model of craft_jax embeds tokens in its own width"
            )
        norm_first = config.get("do_layer_norm_before", True)
        spec = ModelSpec.simplest(
            vocab_size=vocab_size,
            num_layers=num_layers,
            num_heads=num_heads,
            d_model=d_model,
            d_ff=config.get("ffn_dim", 3072),
            max_seq_len=config.get("max_position_embeddings", 2048),
            dropout=one_rate(config, self._rates, rates),
            activation=activation(config, "activation_function", "relu", crossed),
            bias=config.get("enable_bias", True),
            norm_bias=True,
            norm_first=norm_first,
            final_norm=norm_first and not config.get("_remove_final_layer_norm", False),
            tie_embeddings=config.get("tie_word_embeddings", True),
            norm_eps=_EPS,
        )
        return Reading(spec, crossed, tuple(rates.values()))
