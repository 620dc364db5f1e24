"""A model of craft_jax in PyTorch: this one file, `config.json`, `model.safetensors`, and torch.

    from modeling_craft import CraftForCausalLM

    model = CraftForCausalLM.from_pretrained(folder)
    model.generate([[1, 2, 3]], max_new_tokens=20, temperature=0.8, seed=0)

A model that reads a source and writes a target is a `CraftForSeq2Seq`; one that was trained on
pixels has `generate_images`; a `CraftFlow` turns noise into images. Parameters have the names and
layouts of craft_jax. The model computes in the dtype of its weights, and layer norms, activations,
softmax, logits and velocities in at least float32, so that after `.double()` it is float64
throughout.

Shape letters: B batch, T query time or patches, S key or source time, D model width, H heads, K
head width, F hidden, V vocabulary; of images H height, W width, C channels, P numbers in a patch.
"""

import dataclasses
import json
import math
import mmap
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

FORMAT = 1
"""The latest `craft_format` of config.json that this file knows."""

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}
_FREQUENCIES, _FLOW_EPS, _GUIDANCE = 128, 1e-6, 1.5
_MEMORY_LENGTHS = {"none": None, "zeros": 1, "empty": 0}

_STACK = {"norm_first", "positions", "embedding_scale", "head_bias"}
_SETTINGS = {
    "gpt": {"norm_bias", "head_bias"},
    "transformer": {*_STACK, "norm_bias", "final_norm", "final_norm_bias", "cross_attention"},
    "seq2seq": {*_STACK, "num_decoder_layers", "share_embeddings"},
    "flow": set(),
}
"""What config.json says of a model of each family, beside what it says of all."""
_LATER = {"gpt": {"norm_bias", "head_bias"}}
"""What it has not always said."""


@dataclasses.dataclass(frozen=True)
class CraftConfig:
    """The architecture, and what generation needs to know of the tokenizer.

    Attributes:
      name: gpt; transformer, of the layers of `torch.nn`; or seq2seq, an encoder and a decoder.
      vocab_size, num_layers, num_heads, d_model, d_ff, max_seq_len, num_decoder_layers: sizes.
      dropout: applied in `train()` only.
      activation: gelu (exact), gelu_tanh, relu or silu.
      bias, head_bias: whether dense layers and the head have biases.
      norm_bias, final_norm_bias: whether layer norms have; None for as above.
      norm_eps, norm_first: their epsilon; whether they stand before each part, not after each sum.
      final_norm: whether one follows the last block.
      positions: learned, or sinusoidal (a table that never trains).
      embedding_scale: whether embedded tokens are multiplied by the root of `d_model`.
      cross_attention: none, or to one zero vector (zeros), or to a memory of length 0 (empty).
      tie_embeddings: whether the head is the embedding of what it predicts.
      share_embeddings: whether source and target have one.
      eos_token_id: the token that ends a text, or None.
      tokenizer_vocab_size: ids from here on only pad the embedding, and are never generated.
      images: what the images are that it was trained on: `height`, `width`, `channels`,
        `label_names`, and the `palette` whose colours its ids stand for; None for text.
    """

    name: str
    vocab_size: int
    num_layers: int
    num_heads: int
    d_model: int
    d_ff: int
    max_seq_len: int
    dropout: float
    activation: str
    bias: bool
    tie_embeddings: bool
    norm_eps: float
    num_decoder_layers: int = 0
    norm_bias: "bool | None" = None
    norm_first: bool = True
    final_norm: bool = True
    final_norm_bias: "bool | None" = None
    positions: str = "learned"
    embedding_scale: bool = False
    cross_attention: str = "none"
    share_embeddings: bool = False
    head_bias: bool = False
    eos_token_id: "int | None" = None
    tokenizer_vocab_size: "int | None" = None
    images: "dict | None" = None

    def __post_init__(self):
        for field, same in (("norm_bias", "bias"), ("final_norm_bias", "norm_bias")):
            if getattr(self, field) is None:
                object.__setattr__(self, field, getattr(self, same))
        if self.num_heads < 1 or self.d_model % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} does not divide d_model={self.d_model}")
        for field, choices in (
            ("name", _SETTINGS),
            ("activation", _ACTIVATIONS),
            ("positions", ("learned", "sinusoidal")),
            ("cross_attention", _MEMORY_LENGTHS),
        ):
            if getattr(self, field) not in choices:
                value = getattr(self, field)
                raise ValueError(f"{field}={value!r} is not one of {', '.join(choices)}")

    @classmethod
    def from_json(cls, path):
        """Reads `config.json`: see `read_config`."""
        return read_config(path)


@dataclasses.dataclass(frozen=True)
class FlowConfig:
    """The architecture of a flow.

    Attributes:
      name: flow.
      height, width, channels, num_classes: of the images; 0 classes for images without labels.
      patch_size, num_layers, num_heads, d_model, d_ff: sizes.
      dropout: applied in `train()` only.
      label_dropout, times: how it was trained.
      images: see `CraftConfig`.
    """

    name: str
    height: int
    width: int
    channels: int
    num_classes: int
    patch_size: int
    num_layers: int
    num_heads: int
    d_model: int
    d_ff: int
    dropout: float
    label_dropout: float
    times: str
    images: "dict | None" = None
    bias = True
    activation = "gelu_tanh"


def read_config(path):
    """Reads `config.json`: returns a `CraftConfig`, or a `FlowConfig`.

    Raises:
      ValueError: it says something that this file does not know, or lacks something.
    """
    config = json.loads(Path(path).read_text(encoding="utf-8"))
    if config.get("model_type") != "craft" or config.get("craft_format") != FORMAT:
        raise ValueError(
            f"{path}: model_type={config.get('model_type')!r}, "
            f"craft_format={config.get('craft_format')!r}; this file reads 'craft', {FORMAT}"
        )
    model = config["model"]
    name = model.get("name")
    if name not in _SETTINGS:
        raise ValueError(f"{path}: model {name!r} is not one of {', '.join(_SETTINGS)}")
    cls = FlowConfig if name == "flow" else CraftConfig
    of_all = {f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING}
    wanted = of_all | _SETTINGS[name]
    unknown, lacking = set(model) - wanted, wanted - set(model) - _LATER.get(name, set())
    if unknown or lacking:
        raise ValueError(
            f"{path}: unknown settings {sorted(unknown)}, missing settings {sorted(lacking)}"
        )
    outside = {"eos_token_id", "tokenizer_vocab_size", "images"}
    outside &= {f.name for f in dataclasses.fields(cls)}
    return cls(**model, **{field: config.get(field) for field in outside})


def _at_least_float32(dtype):
    return torch.promote_types(dtype, torch.float32)


class Linear(nn.Module):
    """`x @ kernel + bias`; the kernel is (in, out)."""

    def __init__(self, d_in, d_out, bias):
        super().__init__()
        self.kernel = nn.Parameter(torch.empty(d_in, d_out))
        self.bias = nn.Parameter(torch.empty(d_out)) if bias else None

    def forward(self, x):
        dtype = torch.promote_types(x.dtype, self.kernel.dtype)
        y = x.to(dtype) @ self.kernel.to(dtype)
        return y if self.bias is None else y + self.bias.to(dtype)


class Embedding(nn.Module):
    """A table of vectors, read by index; a `constant` one never trains."""

    def __init__(self, rows, d, leaf="embedding"):
        super().__init__()
        table_VD = nn.Parameter(torch.empty(rows, d), requires_grad=leaf != "constant")
        self.register_parameter(leaf, table_VD)
        self.leaf = leaf

    def forward(self, ids):
        return getattr(self, self.leaf)[ids]


class Head(nn.Module):
    """Inner products with the rows of a table, and a bias, in at least float32."""

    def __init__(self, config):
        super().__init__()
        rows, d = config.vocab_size, config.d_model
        self.embedding = None if config.tie_embeddings else nn.Parameter(torch.empty(rows, d))
        self.bias = nn.Parameter(torch.empty(rows)) if config.head_bias else None

    def forward(self, x_BTD, tied_VD):
        """Returns logits_BTV; `tied_VD` serves where the head has no table of its own."""
        table_VD = tied_VD if self.embedding is None else self.embedding
        wide = _at_least_float32(torch.promote_types(x_BTD.dtype, table_VD.dtype))
        logits_BTV = x_BTD.to(wide) @ table_VD.to(wide).T
        return logits_BTV if self.bias is None else logits_BTV + self.bias.to(wide)


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis, with statistics in at least float32."""

    def __init__(self, d, bias, eps):
        super().__init__()
        self.scale = nn.Parameter(torch.empty(d))
        self.bias = nn.Parameter(torch.empty(d)) if bias else None
        self.eps = eps

    def forward(self, x):
        wide = _at_least_float32(x.dtype)
        bias = None if self.bias is None else self.bias.to(wide)
        y = F.layer_norm(x.to(wide), self.scale.shape, self.scale.to(wide), bias, self.eps)
        return y.to(x.dtype)


class Attention(nn.Module):
    """Multi-head attention to keys and values that were made before."""

    def __init__(self, config):
        super().__init__()
        d = config.d_model
        self.query, self.key, self.value, self.out = (Linear(d, d, config.bias) for _ in range(4))
        self.num_heads, self.dropout = config.num_heads, config.dropout

    def heads(self, x_BTD):
        """Splits the width: x_BHTK."""
        B, T, D = x_BTD.shape
        return x_BTD.reshape(B, T, self.num_heads, D // self.num_heads).transpose(1, 2)

    def keys_and_values(self, x_BSD):
        """Returns k_BHSK and v_BHSK."""
        return self.heads(self.key(x_BSD)), self.heads(self.value(x_BSD))

    def forward(self, x_BTD, kv, visible_BTS=None):
        """Returns y_BTD.

        Args:
          x_BTD: becomes queries.
          kv: k_BHSK and v_BHSK, B of which may be 1; without a key, S = 0, no value is added.
          visible_BTS: bool, what each query attends to, B and T of which may be 1; None: all.
        """
        q_BHTK, (k_BHSK, v_BHSK) = self.heads(self.query(x_BTD)), kv
        wide = _at_least_float32(q_BHTK.dtype)
        scores_BHTS = q_BHTK.to(wide) @ k_BHSK.to(wide).transpose(-1, -2)
        scores_BHTS = scores_BHTS / math.sqrt(q_BHTK.shape[-1])
        if visible_BTS is not None:
            lowest = torch.finfo(wide).min
            scores_BHTS = scores_BHTS.masked_fill(~visible_BTS[:, None], lowest)
        probs_BHTS = torch.softmax(scores_BHTS, dim=-1)
        probs_BHTS = F.dropout(probs_BHTS, self.dropout, self.training)
        y_BHTK = probs_BHTS.to(v_BHSK.dtype) @ v_BHSK
        return self.out(y_BHTK.transpose(1, 2).reshape(x_BTD.shape))


class MLP(nn.Module):
    """Two dense layers with an activation between them; of `torch.nn`'s layers, dropout too."""

    def __init__(self, config):
        super().__init__()
        self.up = Linear(config.d_model, config.d_ff, config.bias)
        self.down = Linear(config.d_ff, config.d_model, config.bias)
        self.activation = _ACTIVATIONS[config.activation]
        self.dropout = 0.0 if config.name in ("gpt", "flow") else config.dropout

    def forward(self, x_BTD):
        h_BTF = self.up(x_BTD)
        wide = h_BTF.to(_at_least_float32(h_BTF.dtype))
        h_BTF = self.activation(wide).to(h_BTF.dtype)
        return self.down(F.dropout(h_BTF, self.dropout, self.training))


class Block(nn.Module):
    """Self-attention, perhaps attention to a memory, and an MLP, each added to what it read.

    Layer norms stand before each (`norm_first`), or after each sum.
    """

    def __init__(self, config, has_cross):
        super().__init__()

        def norm():
            return LayerNorm(config.d_model, config.norm_bias, config.norm_eps)

        self.attn_norm, self.attn = norm(), Attention(config)
        self.cross_norm = norm() if has_cross else None
        self.cross = Attention(config) if has_cross else None
        self.mlp_norm, self.mlp = norm(), MLP(config)
        self.norm_first, self.dropout = config.norm_first, config.dropout

    def forward(self, x_BTD, visible_BTS=None, past=None, memory=None):
        """Returns y_BTD, and the keys and values of self-attention.

        Args:
          x_BTD: the residual stream.
          visible_BTS: what self-attention sees; see `Attention`.
          past: keys and values of earlier positions, or None.
          memory: what cross-attention is called with behind its queries.
        """
        h_BTD = self._before(self.attn_norm, x_BTD)
        k_BHSK, v_BHSK = self.attn.keys_and_values(h_BTD)
        if past is not None:
            k_BHSK, v_BHSK = (torch.cat(p, dim=2) for p in ((past[0], k_BHSK), (past[1], v_BHSK)))
        y_BTD = self.attn(h_BTD, (k_BHSK, v_BHSK), visible_BTS)
        x_BTD = self._after(self.attn_norm, x_BTD, y_BTD)
        if self.cross is not None:
            y_BTD = self.cross(self._before(self.cross_norm, x_BTD), *memory)
            x_BTD = self._after(self.cross_norm, x_BTD, y_BTD)
        y_BTD = self.mlp(self._before(self.mlp_norm, x_BTD))
        return self._after(self.mlp_norm, x_BTD, y_BTD), (k_BHSK, v_BHSK)

    def _before(self, norm, x_BTD):
        return norm(x_BTD) if self.norm_first else x_BTD

    def _after(self, norm, x_BTD, y_BTD):
        x_BTD = x_BTD + F.dropout(y_BTD, self.dropout, self.training)
        return x_BTD if self.norm_first else norm(x_BTD)


class Cache(NamedTuple):
    """What a model goes on from.

    Attributes:
      layers: k_BHSK and v_BHSK of each layer's self-attention.
      source: those of each layer's attention to a source, or None.
      source_mask_BS: bool, which of them are text, or None for all.
    """

    layers: tuple
    source: "tuple | None" = None
    source_mask_BS: "torch.Tensor | None" = None

    @property
    def length(self):
        """How many positions it holds."""
        return self.layers[0][0].shape[2] if self.layers else 0


class Output(NamedTuple):
    """What a forward pass gives.

    Attributes:
      logits: logits_BTV, in at least float32.
      cache: a `Cache` of all positions so far, to go on from; None where some are padding.
    """

    logits: torch.Tensor
    cache: "Cache | None"


class Options(NamedTuple):
    """How `generate` chooses tokens; the options mean what they mean in craft_jax.

    Randomness is torch's, so that samples differ from those of craft_jax; the likeliest tokens
    (temperature 0) do not.

    Attributes:
      temperature: divides the logits; 0 takes the likeliest token.
      top_k, top_p, min_p: which tokens stay, applied in this order.
      repetition_penalty: divides positive and multiplies negative logits of tokens seen.
      seed: of the randomness.
      stop_at_eos: whether a row ends at `eos_token_id`, which is not returned.
    """

    temperature: float = 1.0
    top_k: "int | None" = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop_at_eos: bool = True

    def check(self, vocab_size):
        """Raises ValueError for an impossible option."""
        is_possible = {
            "temperature": 0 <= self.temperature < math.inf,
            "top_k": self.top_k is None or 1 <= self.top_k <= vocab_size,
            "top_p": 0 < self.top_p <= 1,
            "min_p": 0 <= self.min_p <= 1,
            "repetition_penalty": 0 < self.repetition_penalty < math.inf,
        }
        for name in (name for name, possible in is_possible.items() if not possible):
            raise ValueError(f"{name}={getattr(self, name)} is impossible")

    def filtered(self, logits_V, seen):
        """Returns the logits of the tokens that may be chosen, and -inf for the others.

        Args:
          logits_V: of the next token.
          seen: ids in the text so far, int64 (N,).
        """
        if self.repetition_penalty != 1.0:
            logits_V, known, factor = logits_V.clone(), logits_V[seen], self.repetition_penalty
            logits_V[seen] = torch.where(known > 0, known / factor, known * factor)
        if self.temperature == 0:
            return logits_V
        logits_V = logits_V / self.temperature
        if self.top_k is not None:
            smallest = logits_V.topk(min(self.top_k, logits_V.numel())).values[-1]
            logits_V = logits_V.masked_fill(logits_V < smallest, -math.inf)
        if self.top_p < 1.0:
            sorted_V = logits_V.sort(descending=True).values
            probs_V = torch.softmax(sorted_V, dim=-1)
            # A token stays while those before it have not reached top_p, so the first always does.
            kept_V = probs_V.cumsum(dim=-1) - probs_V < self.top_p
            logits_V = logits_V.masked_fill(logits_V < sorted_V[kept_V][-1], -math.inf)
        if self.min_p > 0.0:
            floor = logits_V.max() + math.log(self.min_p)
            logits_V = logits_V.masked_fill(logits_V < floor, -math.inf)
        return logits_V


class CraftModel(nn.Module):
    """What all models share. Parameters are uninitialised; see `from_pretrained`."""

    families = ()

    def __init__(self, config):
        super().__init__()
        if config.name not in self.families:
            right = next(c for c in CraftModel.__subclasses__() if config.name in c.families)
            raise ValueError(f"a {config.name} is a {right.__name__}, not a {type(self).__name__}")
        self.config = config

    @classmethod
    def from_pretrained(cls, folder, device="cpu", dtype=None):
        """Loads a folder, strictly.

        Args:
          folder: holds `config.json` and `model.safetensors`, or its shards and their index.
          device: where the parameters go.
          dtype: of all parameters; None keeps the dtype of each.

        Raises:
          ValueError: tensors are missing, left over or of another shape; a file is damaged; the
            model is one of the other class.
        """
        folder = Path(folder)
        config = read_config(folder / "config.json")
        with torch.device("meta"):
            model = cls(config)
        tensors = _read_folder(folder)
        wanted = model.state_dict()
        problems = [f"missing: {name}" for name in wanted if name not in tensors]
        problems += [f"unexpected: {name}" for name in tensors if name not in wanted]
        problems += [
            f"{name} is {list(tensors[name].shape)}, not {list(tensor.shape)}"
            for name, tensor in wanted.items()
            if name in tensors and tensors[name].shape != tensor.shape
        ]
        if problems:
            shown = "; ".join(problems[:10])
            raise ValueError(f"{folder}: {len(problems)} tensors are wrong: {shown}")
        tensors = {
            name: tensor.to(device=device, dtype=dtype or tensor.dtype)
            for name, tensor in tensors.items()
        }
        model.load_state_dict(tensors, strict=True, assign=True)
        return model.eval()

    def _positions(self):
        leaf = "constant" if self.config.positions == "sinusoidal" else "embedding"
        return Embedding(self.config.max_seq_len, self.config.d_model, leaf)

    def _stack(self, count, has_cross):
        return nn.ModuleList(Block(self.config, has_cross) for _ in range(count))

    def _final_norm(self):
        config = self.config
        return LayerNorm(config.d_model, config.final_norm_bias, config.norm_eps)

    def _embed(self, ids_BT, table, positions, past=0):
        """Returns x_BTD of ids that stand behind `past` others."""
        config, T = self.config, ids_BT.shape[1]
        if past + T > config.max_seq_len:
            raise ValueError(f"{past + T} tokens exceed max_seq_len={config.max_seq_len}")
        x_BTD = table(ids_BT)
        if config.embedding_scale:
            wide = x_BTD.to(_at_least_float32(x_BTD.dtype))
            x_BTD = (wide * math.sqrt(config.d_model)).to(x_BTD.dtype)
        x_BTD = x_BTD + positions(torch.arange(past, past + T, device=ids_BT.device))
        return F.dropout(x_BTD, config.dropout, self.training)

    def _decode(self, blocks, x_BTD, mask_BT, cache, memories):
        """Runs causal blocks: returns y_BTD, and keys and values of each with the cached ones."""
        if mask_BT is not None and cache is not None and cache.length:
            raise ValueError("a cache knows no padding: pass mask_BT without one")
        T = x_BTD.shape[1]
        past = cache.length if cache is not None else 0
        visible_BTS = torch.ones(1, T, past + T, dtype=torch.bool, device=x_BTD.device).tril(past)
        if mask_BT is not None:
            visible_BTS = visible_BTS & mask_BT[:, None, :]
        kvs = []
        for i, block in enumerate(blocks):
            cached = cache.layers[i] if past else None
            x_BTD, kv = block(x_BTD, visible_BTS, cached, memories[i] if memories else None)
            kvs.append(kv)
        return x_BTD, tuple(kvs)

    def _ids(self, rows):
        return torch.tensor(rows, device=next(self.parameters()).device)

    @torch.no_grad()
    def _generate(self, rows, options, make):
        """Returns `make(row, choose, end)` of each row, without dropout."""
        config = self.config
        vocab_size = config.tokenizer_vocab_size or config.vocab_size
        options.check(vocab_size)
        rows = rows.tolist() if torch.is_tensor(rows) else rows
        if not all(isinstance(row, (list, tuple)) for row in rows):
            raise ValueError("give a list of lists of ids, or a matrix of them")
        for row in rows:
            if not 0 < len(row) <= config.max_seq_len:
                raise ValueError(f"a row of {len(row)} tokens; it takes 1 to {config.max_seq_len}")
            if not all(0 <= token < config.vocab_size for token in row):
                raise ValueError(f"a row has ids outside [0, {config.vocab_size}): {row}")
        generator = torch.Generator(next(self.parameters()).device).manual_seed(options.seed)

        def choose(logits_V, text):
            logits_V = options.filtered(logits_V[:vocab_size], self._ids(text))
            if options.temperature == 0:
                return int(logits_V.argmax())
            probs_V = torch.softmax(logits_V, dim=-1)
            return int(torch.multinomial(probs_V, 1, generator=generator))

        end = config.eos_token_id if options.stop_at_eos else None
        was_training = self.training
        self.eval()
        try:
            return [make(row, choose, end) for row in rows]
        finally:
            self.train(was_training)

    def _continue(self, prompt, cache, max_new_tokens, choose, end):
        """Returns the ids that follow a prompt; past the context from the text's last half."""
        context = self.config.max_seq_len
        text, new = list(prompt), list(prompt)
        while len(text) < len(prompt) + max_new_tokens:
            if cache is not None and cache.length >= context:
                new, cache = text[-max(1, context // 2) :], None
            logits_BTV, cache = self(self._ids([new]), cache=cache)
            token = choose(logits_BTV[0, -1], text)
            if token == end:
                break
            text.append(token)
            new = [token]
        return text[len(prompt) :]


class CraftForCausalLM(CraftModel):
    """A language model: a `gpt` or a `transformer`."""

    families = ("gpt", "transformer")

    def __init__(self, config):
        super().__init__(config)
        self.token_embedding = Embedding(config.vocab_size, config.d_model)
        self.position_embedding = self._positions()
        self.blocks = self._stack(config.num_layers, config.cross_attention != "none")
        self.final_norm = self._final_norm() if config.final_norm else None
        self.head = Head(config)

    def forward(self, tokens_BT, cache=None, mask_BT=None):
        """Computes logits.

        Args:
          tokens_BT: ids, int64, in [0, vocab_size).
          cache: what an earlier call returned, to go on behind its tokens; None to begin.
          mask_BT: bool, false where a token is padding that no other attends to; None for all text.
            Without a cache only.

        Returns:
          An `Output`: logits, and the cache with these tokens added.

        Raises:
          ValueError: more positions than the model has, or a mask and a cache.
        """
        past = 0 if cache is None else cache.length
        x_BTD = self._embed(tokens_BT, self.token_embedding, self.position_embedding, past)
        length, memories = _MEMORY_LENGTHS[self.config.cross_attention], None
        if length is not None:
            memory_BSD = x_BTD.new_zeros(1, length, x_BTD.shape[-1])
            memories = [(block.cross.keys_and_values(memory_BSD),) for block in self.blocks]
        x_BTD, layers = self._decode(self.blocks, x_BTD, mask_BT, cache, memories)
        if self.final_norm is not None:
            x_BTD = self.final_norm(x_BTD)
        logits_BTV = self.head(x_BTD, self.token_embedding.embedding)
        return Output(logits_BTV, Cache(layers) if mask_BT is None else None)

    def generate(self, prompts, *, max_new_tokens, **options):
        """Continues prompts; a row that fills the context goes on from its last half.

        Args:
          prompts: a list of lists of ids, or ids_BT; one to max_seq_len tokens in each.
          max_new_tokens: per row.
          **options: see `Options`.

        Returns:
          The new ids of each row, a list of lists.

        Raises:
          ValueError: an impossible option or prompt.
        """

        def make(row, choose, end):
            return self._continue(row, None, max_new_tokens, choose, end)

        return self._generate(prompts, Options(**options), make)

    def generate_images(self, labels, **options):
        """Makes an image for each label, pixel after pixel.

        Args:
          labels: a list of numbers of classes; of 0 for images without labels.
          **options: see `Options`.

        Returns:
          uint8 (N, H, W, C).

        Raises:
          ValueError: the model was not trained on images, or an impossible option or label.
        """
        images = self.config.images
        if images is None:
            raise ValueError("this model was trained on text; use `generate`")
        colors, most = images["palette"], max(1, len(images["label_names"]))
        if not all(0 <= label < most for label in labels):
            raise ValueError(f"labels are not all in [0, {most}): {labels}")
        prompts = [[len(colors) + label] for label in labels]
        count = images["height"] * images["width"]
        made = self.generate(prompts, max_new_tokens=count, stop_at_eos=False, **options)
        shape = (len(made), images["height"], images["width"], images["channels"])
        return torch.tensor(colors, dtype=torch.uint8)[torch.tensor(made)].reshape(shape)


class CraftForSeq2Seq(CraftModel):
    """Reads a source, writes a target: a `seq2seq`."""

    families = ("seq2seq",)

    def __init__(self, config):
        super().__init__(config)
        rows, d = config.vocab_size, config.d_model
        self.source_embedding = None if config.share_embeddings else Embedding(rows, d)
        self.source_positions = self._positions()
        self.encoder = self._stack(config.num_layers, has_cross=False)
        self.encoder_norm = self._final_norm()
        self.target_embedding = Embedding(rows, d)
        self.target_positions = self._positions()
        self.decoder = self._stack(config.num_decoder_layers, has_cross=True)
        self.decoder_norm = self._final_norm()
        self.head = Head(config)

    def encode(self, source_BS, source_mask_BS=None):
        """Reads a source: returns a `Cache` without any token of a target.

        Args:
          source_BS: ids, int64, in [0, vocab_size).
          source_mask_BS: bool, false for padding; None for all text.
        """
        table = self.source_embedding or self.target_embedding
        x_BSD = self._embed(source_BS, table, self.source_positions)
        visible_BTS = None if source_mask_BS is None else source_mask_BS[:, None, :]
        for block in self.encoder:
            x_BSD, _ = block(x_BSD, visible_BTS)
        x_BSD = self.encoder_norm(x_BSD)
        source = tuple(block.cross.keys_and_values(x_BSD) for block in self.decoder)
        return Cache((), source, source_mask_BS)

    def forward(self, tokens_BT, source_BS=None, source_mask_BS=None, mask_BT=None, cache=None):
        """Computes logits of a target.

        Args:
          tokens_BT: the target so far: ids, int64, in [0, vocab_size).
          source_BS, source_mask_BS: see `encode`.
          mask_BT: bool, false where a token of the target is padding; None for all text.
          cache: what an earlier call returned, or `encode`, in place of a source.

        Returns:
          An `Output`: logits, and the cache with these tokens added.

        Raises:
          ValueError: more positions than the model has, not one of source and cache, or a mask and
            a cache with tokens.
        """
        if (cache is None) == (source_BS is None):
            raise ValueError("the source is given once: as source_BS, or in the cache")
        if cache is None:
            cache = self.encode(source_BS, source_mask_BS)
        x_BTD = self._embed(tokens_BT, self.target_embedding, self.target_positions, cache.length)
        mask_BS = cache.source_mask_BS
        visible_BTS = None if mask_BS is None else mask_BS[:, None, :]
        memories = [(kv, visible_BTS) for kv in cache.source]
        x_BTD, layers = self._decode(self.decoder, x_BTD, mask_BT, cache, memories)
        logits_BTV = self.head(self.decoder_norm(x_BTD), self.target_embedding.embedding)
        return Output(logits_BTV, cache._replace(layers=layers) if mask_BT is None else None)

    def generate(self, sources, *, max_new_tokens, num_beams=1, length_penalty=0.0, **options):
        """Writes a target for each source, from `eos_token_id` on, or from 0 if there is none.

        Args:
          sources: a list of lists of ids, or ids_BS; one to max_seq_len tokens in each.
          max_new_tokens: per target, which ends where the positions do at the latest.
          num_beams: above 1, searches with so many hypotheses, of which the greedy one is always
            one. The score is the log-probability, with that of the end if it was reached, divided
            by the number of tokens to the power of `length_penalty`.
          length_penalty: 0 or more; 1 compares the means of tokens.
          **options: see `Options`; beams know `stop_at_eos` only.

        Returns:
          The ids of each target, a list of lists.

        Raises:
          ValueError: an impossible option or source.
        """
        if num_beams < 1 or not 0 <= length_penalty < math.inf:
            raise ValueError(f"num_beams={num_beams} or length_penalty={length_penalty}")
        if num_beams > 1 and set(options) - {"seed", "stop_at_eos"}:
            raise ValueError(f"num_beams={num_beams} chooses by score: leave out {list(options)}")
        count = min(max_new_tokens, self.config.max_seq_len)
        start = self.config.eos_token_id or 0

        def make(row, choose, end):
            cache = self.encode(self._ids([row]))
            if num_beams == 1:
                return self._continue([start], cache, count, choose, end)
            return self._search(start, cache, count, num_beams, length_penalty, end)

        return self._generate(sources, Options(**options), make)

    def _search(self, start, cache, count, num_beams, length_penalty, end):
        """Returns the ids of the best target of up to `count` tokens that beam search finds."""
        texts, totals_B, greedy, best, found = [[start]], torch.zeros(1), True, -math.inf, []
        for length in range(1, count + 1):
            logits_BTV, cache = self(self._ids([text[-1:] for text in texts]), cache=cache)
            logits_BV = logits_BTV[:, -1, : self.config.tokenizer_vocab_size]
            V = logits_BV.shape[-1]
            scores = totals_B.to(logits_BV)[:, None] + torch.log_softmax(logits_BV, dim=-1)
            scores = scores.flatten()
            # Continuation i is token i % V behind text i // V. That of the greedy text stands
            # first, then the best others: as many as may end, and num_beams - 1 to go on.
            first = [int(logits_BV[0].argmax())] if greedy else []
            others = scores.index_fill(0, self._ids(first).long(), -math.inf)
            others = others.topk(min(2 * num_beams - 1, len(others)))
            others = others.indices[others.values > -math.inf].tolist()
            complete = [i for i in first + others[: num_beams - 1] if i % V == end]
            first = [i for i in first if i % V != end]
            kept = first + [i for i in others if i % V != end][: num_beams - 1]
            for i in complete + (kept if length == count else []):
                score = float(scores[i]) / length**length_penalty
                if score > best:
                    best, found = score, [*texts[i // V], i % V][1:]
            # No token has a positive score: what goes on may become better by its length only.
            if not kept or float(scores[kept].max()) / count**length_penalty <= best:
                break
            rows, greedy, totals_B = [i // V for i in kept], bool(first), scores[kept]
            texts = [[*texts[i // V], i % V] for i in kept]
            cache = cache._replace(layers=tuple((k[rows], v[rows]) for k, v in cache.layers))
        return [token for token in found if token != end]


class TimeEmbedding(nn.Module):
    """A vector for a time in [0, 1]: an MLP of its sines and cosines."""

    def __init__(self, d):
        super().__init__()
        self.up, self.down = Linear(2 * _FREQUENCIES, d, True), Linear(d, d, True)

    def forward(self, t_B):
        """Returns c_BD."""
        wide, device = _at_least_float32(t_B.dtype), t_B.device
        steps_F = torch.arange(_FREQUENCIES, dtype=torch.float64, device=device)
        rate_F = 1000 * torch.exp(-math.log(10000) * steps_F / _FREQUENCIES)
        angle_BF = t_B.to(wide)[:, None] * rate_F.to(wide)
        features_BF = torch.cat([angle_BF.cos(), angle_BF.sin()], dim=-1)
        return self.down(_silu(self.up(features_BF.to(self.up.kernel.dtype))))


def _silu(x):
    return F.silu(x.to(_at_least_float32(x.dtype))).to(x.dtype)


def _modulated(x_BTD, shift_B1D, scale_B1D):
    """Layer norm whose scale, beyond 1, and shift are given."""
    wide = x_BTD.to(_at_least_float32(x_BTD.dtype))
    y_BTD = F.layer_norm(wide, wide.shape[-1:], eps=_FLOW_EPS).to(x_BTD.dtype)
    return y_BTD * (1 + scale_B1D) + shift_B1D


class FlowBlock(nn.Module):
    """Attention and an MLP, each added by a gate; norms and gates follow a condition."""

    def __init__(self, config):
        super().__init__()
        self.modulation = Linear(config.d_model, 6 * config.d_model, True)
        self.attn, self.mlp, self.dropout = Attention(config), MLP(config), config.dropout

    def forward(self, x_BTD, c_BD):
        """Returns y_BTD."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.modulation(_silu(c_BD))[
            :, None
        ].chunk(6, dim=-1)
        h_BTD = _modulated(x_BTD, shift, scale)
        y_BTD = self.attn(h_BTD, self.attn.keys_and_values(h_BTD))
        x_BTD = x_BTD + gate * F.dropout(y_BTD, self.dropout, self.training)
        y_BTD = self.mlp(_modulated(x_BTD, mlp_shift, mlp_scale))
        return x_BTD + mlp_gate * F.dropout(y_BTD, self.dropout, self.training)


class CraftFlow(CraftModel):
    """Turns noise into images along predicted velocities: a `flow`."""

    families = ("flow",)

    def __init__(self, config):
        super().__init__(config)
        d, size = config.d_model, config.patch_size
        count = config.height // size * (config.width // size)
        self.patch_embedding = Linear(size * size * config.channels, d, True)
        self.position_embedding = Embedding(count, d)
        self.time_embedding = TimeEmbedding(d)
        self.label_embedding = Embedding(config.num_classes + 1, d) if config.num_classes else None
        self.blocks = nn.ModuleList(FlowBlock(config) for _ in range(config.num_layers))
        self.final_modulation = Linear(d, 2 * d, True)
        self.head = Linear(d, size * size * config.channels, True)

    def forward(self, x_BHWC, t_B, labels_B=None):
        """Returns velocities v_BHWC, in at least float32.

        Args:
          x_BHWC: points on the way from noise, at time 0, to an image in [-1, 1], at time 1.
          t_B: where on the way, in [0, 1].
          labels_B: ids, int64, in [0, num_classes]; `num_classes` and None stand for no label.
        """
        B, H, W, C = x_BHWC.shape
        size = self.config.patch_size
        rows, columns = H // size, W // size
        cut = x_BHWC.reshape(B, rows, size, columns, size, C).permute(0, 1, 3, 2, 4, 5)
        positions_TD = self.position_embedding(torch.arange(rows * columns, device=x_BHWC.device))
        x_BTP = cut.reshape(B, rows * columns, size * size * C).to(positions_TD.dtype)
        x_BTD = self.patch_embedding(x_BTP) + positions_TD
        c_BD = self.time_embedding(t_B)
        if self.label_embedding is not None:
            if labels_B is None:
                labels_B = torch.full((B,), self.config.num_classes, device=x_BHWC.device)
            c_BD = c_BD + self.label_embedding(labels_B)
        for block in self.blocks:
            x_BTD = block(x_BTD, c_BD)
        shift, scale = self.final_modulation(_silu(c_BD))[:, None].chunk(2, dim=-1)
        v_BTP = self.head(_modulated(x_BTD, shift, scale))
        v_BTP = v_BTP.to(_at_least_float32(v_BTP.dtype))
        whole = v_BTP.reshape(B, rows, columns, size, size, C).permute(0, 1, 3, 2, 4, 5)
        return whole.reshape(B, H, W, C)

    @torch.no_grad()
    def generate(
        self, labels, *, noise_BHWC=None, seed=0, num_steps=50, solver="heun", guidance=None
    ):
        """Makes an image for each label; the same as craft_jax from the same noise.

        Args:
          labels: a list of ids, or ids (B,), in [0, num_classes]; `num_classes` for none.
          noise_BHWC: where the way begins, whose dtype the images have; None to draw it.
          seed: of the noise, which is torch's.
          num_steps: of equal length.
          solver: euler, or heun, which evaluates the model twice in each step.
          guidance: above 1 keeps closer to the label; None for 1.5 where the model was trained for
            that, else 1.

        Returns:
          x_BHWC, about in [-1, 1]; `to_uint8` makes pixels of it.

        Raises:
          ValueError: an impossible option or label.
        """
        config = self.config
        labels_B = torch.as_tensor(labels, device=self.head.kernel.device).long()
        can_guide = config.num_classes > 0 and config.label_dropout > 0
        if guidance is None:
            guidance = _GUIDANCE if can_guide else 1.0
        if solver not in ("euler", "heun") or num_steps < 1:
            raise ValueError(f"solver={solver!r} or num_steps={num_steps} is impossible")
        if guidance != 1.0 and not can_guide:
            raise ValueError(f"guidance={guidance}: the model was not trained without labels")
        if len(labels_B) and not 0 <= int(labels_B.min()) <= int(labels_B.max()) <= max(
            config.num_classes, 0
        ):
            raise ValueError(f"labels are not all in [0, {config.num_classes}]: {labels}")
        B, x = len(labels_B), noise_BHWC
        if x is None:
            generator = torch.Generator(labels_B.device).manual_seed(seed)
            dtype = _at_least_float32(self.head.kernel.dtype)
            shape = (B, config.height, config.width, config.channels)
            x = torch.randn(shape, generator=generator, dtype=dtype, device=labels_B.device)

        def velocity(x, t):
            if guidance == 1.0:
                return self(x, x.new_full((B,), t), labels_B)
            nothing_B = torch.full_like(labels_B, config.num_classes)
            both = self(
                torch.cat([x, x]), x.new_full((2 * B,), t), torch.cat([labels_B, nothing_B])
            )
            with_label, without = both.chunk(2)
            return without + guidance * (with_label - without)

        was_training = self.training
        self.eval()
        try:
            for number in range(num_steps):
                start, end = number / num_steps, (number + 1) / num_steps
                v = velocity(x, start)
                if solver == "heun":
                    v = (v + velocity(x + (end - start) * v, end)) / 2
                x = (x + (end - start) * v).to(x.dtype)
        finally:
            self.train(was_training)
        return x


def to_uint8(images):
    """Returns images in [-1, 1] as the nearest of 0, ..., 255, uint8."""
    return ((images.float() + 1) * 127.5).nan_to_num(0).clamp(0, 255).round().to(torch.uint8)


def _read_folder(folder):
    """Returns the tensors of `model.safetensors`, or of the shards that its index names."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return read_safetensors(folder / "model.safetensors")
    if not index.is_file():
        raise ValueError(f"{folder} holds no model.safetensors")
    mapped = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    tensors = {}
    for file in sorted(set(mapped.values())):
        tensors.update(read_safetensors(folder / Path(file).name))
    return tensors


def read_safetensors(path):
    """Returns the tensors of a file, each in memory of its own."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"{path} is truncated: {size} bytes")
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        begin = 8 + length
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if begin + end != size:
            raise ValueError(f"{path} has {size} bytes, and its header says {begin + end}")
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in _DTYPES:
            raise ValueError(f"{path}: {name} is {entry['dtype']}, not one of {list(_DTYPES)}")
        dtype, shape = _DTYPES[entry["dtype"]], entry["shape"]
        start, stop = (begin + offset for offset in entry["data_offsets"])
        count = math.prod(shape)
        if stop - start != count * dtype.itemsize:
            raise ValueError(f"{path}: {name} has {stop - start} bytes, which do not fit {shape}")
        raw = bytearray(data[start:stop])
        tensors[name] = (
            torch.frombuffer(raw, dtype=dtype) if count else torch.empty(0, dtype=dtype)
        ).reshape(shape)
    return tensors
