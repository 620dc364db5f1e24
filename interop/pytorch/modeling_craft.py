"""A model of craft_jax in PyTorch: this one file, `config.json`, `model.safetensors`, and torch.

    from modeling_craft import CraftForCausalLM

    model = CraftForCausalLM.from_pretrained(folder)
    model.generate([[1, 2, 3]], max_new_tokens=20, temperature=0.8, seed=0)

Parameters have the names and layouts of craft_jax. The model computes in the dtype of its weights,
and layer norms, activations, softmax and logits in at least float32, so that after `.double()` it
is float64 throughout.

Shape letters: B batch, T query time, S key time, D model width, H heads, K head width, F hidden,
V vocabulary.
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

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


@dataclasses.dataclass(frozen=True)
class CraftConfig:
    """The architecture, and what generation needs to know of the tokenizer.

    Attributes:
      name: the family; `gpt` is a decoder of pre-norm blocks with learned positions.
      vocab_size, num_layers, num_heads, d_model, d_ff, max_seq_len: sizes.
      dropout: applied in `train()` only.
      activation: gelu (exact), gelu_tanh, relu or silu.
      bias: whether dense layers and layer norms have biases.
      tie_embeddings: whether the head is the token embedding.
      norm_eps: epsilon of the layer norms.
      eos_token_id: the token that ends a text, or None.
      tokenizer_vocab_size: ids from here on only pad the embedding, and are never generated.
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
    eos_token_id: "int | None" = None
    tokenizer_vocab_size: "int | None" = None

    def __post_init__(self):
        if self.num_heads < 1 or self.d_model % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} does not divide d_model={self.d_model}")
        if self.activation not in _ACTIVATIONS:
            raise ValueError(f"activation={self.activation!r} is not one of {list(_ACTIVATIONS)}")

    @classmethod
    def from_json(cls, path):
        """Reads `config.json`.

        Raises:
          ValueError: it says something that this file does not know, or lacks something.
        """
        config = json.loads(Path(path).read_text(encoding="utf-8"))
        if config.get("model_type") != "craft" or config.get("craft_format") != FORMAT:
            raise ValueError(
                f"{path}: model_type={config.get('model_type')!r}, "
                f"craft_format={config.get('craft_format')!r}; this file reads 'craft', {FORMAT}"
            )
        outside = {"eos_token_id", "tokenizer_vocab_size"}
        wanted = {field.name for field in dataclasses.fields(cls)} - outside
        unknown, lacking = set(config["model"]) - wanted, wanted - set(config["model"])
        if unknown or lacking:
            raise ValueError(
                f"{path}: unknown settings {sorted(unknown)}, missing settings {sorted(lacking)}"
            )
        if config["model"]["name"] != "gpt":
            raise ValueError(f"{path}: model {config['model']['name']!r} is not known; gpt is")
        return cls(**config["model"], **{name: config.get(name) for name in outside})


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
    """A table of vectors, read by index and, as a head, by inner product."""

    def __init__(self, rows, d):
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(rows, d))

    def forward(self, tokens):
        return self.embedding[tokens]

    def attend(self, x_BTD):
        """Returns inner products with every row, in at least float32."""
        wide = _at_least_float32(torch.promote_types(x_BTD.dtype, self.embedding.dtype))
        return x_BTD.to(wide) @ self.embedding.to(wide).T


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
    """Causal multi-head self-attention."""

    def __init__(self, config):
        super().__init__()
        d = config.d_model
        self.query, self.key, self.value, self.out = (Linear(d, d, config.bias) for _ in range(4))
        self.num_heads, self.dropout = config.num_heads, config.dropout

    def forward(self, x_BTD, cached=None):
        """Returns y_BTD and the keys and values (k_BHSK, v_BHSK) with these positions added."""
        B, T, D = x_BTD.shape
        heads = (B, T, self.num_heads, D // self.num_heads)
        q_BHTK, k_BHSK, v_BHSK = (
            dense(x_BTD).reshape(heads).transpose(1, 2)
            for dense in (self.query, self.key, self.value)
        )
        if cached is not None:
            k_BHSK = torch.cat((cached[0], k_BHSK), dim=2)
            v_BHSK = torch.cat((cached[1], v_BHSK), dim=2)
        wide = _at_least_float32(q_BHTK.dtype)
        scores_BHTS = q_BHTK.to(wide) @ k_BHSK.to(wide).transpose(-1, -2) / math.sqrt(heads[-1])
        S = k_BHSK.shape[2]
        hidden_TS = torch.ones(T, S, dtype=torch.bool, device=x_BTD.device).triu(S - T + 1)
        probs_BHTS = torch.softmax(scores_BHTS.masked_fill(hidden_TS, -math.inf), dim=-1)
        probs_BHTS = F.dropout(probs_BHTS, self.dropout, self.training)
        y_BHTK = probs_BHTS.to(v_BHSK.dtype) @ v_BHSK
        return self.out(y_BHTK.transpose(1, 2).reshape(B, T, D)), (k_BHSK, v_BHSK)


class MLP(nn.Module):
    """Two dense layers with an activation between them."""

    def __init__(self, config):
        super().__init__()
        self.up = Linear(config.d_model, config.d_ff, config.bias)
        self.down = Linear(config.d_ff, config.d_model, config.bias)
        self.activation = _ACTIVATIONS[config.activation]

    def forward(self, x_BTD):
        h_BTF = self.up(x_BTD)
        wide = h_BTF.to(_at_least_float32(h_BTF.dtype))
        return self.down(self.activation(wide).to(h_BTF.dtype))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config):
        super().__init__()
        self.attn_norm = LayerNorm(config.d_model, config.bias, config.norm_eps)
        self.attn = Attention(config)
        self.mlp_norm = LayerNorm(config.d_model, config.bias, config.norm_eps)
        self.mlp = MLP(config)
        self.dropout = config.dropout

    def forward(self, x_BTD, cached=None):
        y_BTD, cached = self.attn(self.attn_norm(x_BTD), cached)
        x_BTD = x_BTD + F.dropout(y_BTD, self.dropout, self.training)
        y_BTD = self.mlp(self.mlp_norm(x_BTD))
        return x_BTD + F.dropout(y_BTD, self.dropout, self.training), cached


class Output(NamedTuple):
    """What a forward pass gives.

    Attributes:
      logits: logits_BTV, in at least float32.
      cache: keys and values of all positions so far, to go on from.
    """

    logits: torch.Tensor
    cache: tuple


class CraftForCausalLM(nn.Module):
    """The model. Its parameters are uninitialised; see `from_pretrained`."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.token_embedding = Embedding(config.vocab_size, config.d_model)
        self.position_embedding = Embedding(config.max_seq_len, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_norm = LayerNorm(config.d_model, config.bias, config.norm_eps)
        self.head = None if config.tie_embeddings else Embedding(config.vocab_size, config.d_model)

    def forward(self, tokens_BT, cache=None):
        """Computes logits.

        Args:
          tokens_BT: ids, int64, in [0, vocab_size).
          cache: what an earlier call returned, to go on behind its tokens; None to begin.

        Returns:
          An `Output`: logits, and the cache with these tokens added.

        Raises:
          ValueError: more positions than the model has.
        """
        past = 0 if cache is None else cache[0][0].shape[2]
        T = tokens_BT.shape[1]
        if past + T > self.config.max_seq_len:
            raise ValueError(f"{past + T} tokens exceed max_seq_len={self.config.max_seq_len}")
        positions_T = torch.arange(past, past + T, device=tokens_BT.device)
        x_BTD = self.token_embedding(tokens_BT) + self.position_embedding(positions_T)
        x_BTD = F.dropout(x_BTD, self.config.dropout, self.training)
        new_cache = []
        for i, block in enumerate(self.blocks):
            x_BTD, cached = block(x_BTD, None if cache is None else cache[i])
            new_cache.append(cached)
        x_BTD = self.final_norm(x_BTD)
        return Output((self.head or self.token_embedding).attend(x_BTD), tuple(new_cache))

    @classmethod
    def from_pretrained(cls, folder, device="cpu", dtype=None):
        """Loads a folder, strictly.

        Args:
          folder: holds `config.json` and `model.safetensors`, or its shards and their index.
          device: where the parameters go.
          dtype: of all parameters; None keeps the dtype of each.

        Raises:
          ValueError: tensors are missing, left over or of another shape; a file is damaged.
        """
        folder = Path(folder)
        config = CraftConfig.from_json(folder / "config.json")
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

    @torch.no_grad()
    def generate(
        self,
        prompts,
        *,
        max_new_tokens,
        temperature=1.0,
        top_k=None,
        top_p=1.0,
        min_p=0.0,
        repetition_penalty=1.0,
        seed=0,
        stop_at_eos=True,
    ):
        """Continues prompts; the sampling options mean what they mean in craft_jax.

        A row that fills the context goes on from its last half. Randomness is torch's, so that
        samples differ from those of craft_jax; the likeliest tokens (temperature 0) do not.

        Args:
          prompts: a list of lists of ids, or ids_BT; one to max_seq_len tokens in each.
          max_new_tokens: per row.
          temperature: divides the logits; 0 takes the likeliest token.
          top_k, top_p, min_p: which tokens stay, applied in this order.
          repetition_penalty: divides positive and multiplies negative logits of tokens seen.
          seed: of the randomness.
          stop_at_eos: whether a row ends at `eos_token_id`, which is not returned.

        Returns:
          The new ids of each row, a list of lists.

        Raises:
          ValueError: an impossible option or prompt.
        """
        vocab_size = self.config.tokenizer_vocab_size or self.config.vocab_size
        if not 0 <= temperature < math.inf or not 0 < top_p <= 1 or not 0 <= min_p <= 1:
            raise ValueError(f"temperature={temperature}, top_p={top_p} or min_p={min_p}")
        if not 0 < repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty={repetition_penalty} must be above 0")
        if top_k is not None and not 1 <= top_k <= vocab_size:
            raise ValueError(f"top_k={top_k} must be from 1 to {vocab_size}")
        rows = prompts.tolist() if torch.is_tensor(prompts) else prompts
        if not all(isinstance(row, (list, tuple)) for row in rows):
            raise ValueError("prompts must be a list of lists of ids, or a matrix of them")
        options = {
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
        }
        device = self.token_embedding.embedding.device
        generator = torch.Generator(device).manual_seed(seed)
        end = self.config.eos_token_id if stop_at_eos else None
        was_training = self.training
        self.eval()
        try:
            return [self._continue(row, max_new_tokens, options, generator, end) for row in rows]
        finally:
            self.train(was_training)

    def _continue(self, row, max_new_tokens, options, generator, end):
        context = self.config.max_seq_len
        if not 0 < len(row) <= context:
            raise ValueError(f"a prompt has {len(row)} tokens; this model takes 1 to {context}")
        if not all(0 <= token < self.config.vocab_size for token in row):
            raise ValueError(f"a prompt has ids outside [0, {self.config.vocab_size}): {row}")
        device = self.token_embedding.embedding.device
        text, new, cache = list(row), list(row), None
        while len(text) < len(row) + max_new_tokens:
            if cache is not None and cache[0][0].shape[2] >= context:
                new, cache = text[-max(1, context // 2) :], None
            logits_BTV, cache = self(torch.tensor([new], device=device), cache)
            logits_V = logits_BTV[0, -1, : self.config.tokenizer_vocab_size]
            logits_V = filtered(logits_V, torch.tensor(text, device=device), **options)
            if options["temperature"] == 0:
                token = int(logits_V.argmax())
            else:
                probs_V = torch.softmax(logits_V, dim=-1)
                token = int(torch.multinomial(probs_V, 1, generator=generator))
            if token == end:
                break
            text.append(token)
            new = [token]
        return text[len(row) :]


def filtered(logits_V, seen, *, temperature, top_k, top_p, min_p, repetition_penalty):
    """Returns the logits of the tokens that may be chosen, and -inf for the others.

    Args:
      logits_V: of the next token.
      seen: ids in the text so far, int64 (N,).
      temperature, top_k, top_p, min_p, repetition_penalty: see `generate`.
    """
    if repetition_penalty != 1.0:
        logits_V = logits_V.clone()
        known = logits_V[seen]
        logits_V[seen] = torch.where(
            known > 0, known / repetition_penalty, known * repetition_penalty
        )
    if temperature == 0:
        return logits_V
    logits_V = logits_V / temperature
    if top_k is not None:
        smallest = logits_V.topk(min(top_k, logits_V.numel())).values[-1]
        logits_V = logits_V.masked_fill(logits_V < smallest, -math.inf)
    if top_p < 1.0:
        sorted_V = logits_V.sort(descending=True).values
        probs_V = torch.softmax(sorted_V, dim=-1)
        # A token stays while those before it have not reached top_p, so the first always does.
        kept_V = probs_V.cumsum(dim=-1) - probs_V < top_p
        logits_V = logits_V.masked_fill(logits_V < sorted_V[kept_V][-1], -math.inf)
    if min_p > 0.0:
        floor = logits_V.max() + math.log(min_p)
        logits_V = logits_V.masked_fill(logits_V < floor, -math.inf)
    return logits_V


def _read_folder(folder):
    """Returns the tensors of `model.safetensors`, or of the shards that its index names."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return _read_safetensors(folder / "model.safetensors")
    if not index.is_file():
        raise ValueError(f"{folder} holds no model.safetensors")
    mapped = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    tensors = {}
    for file in sorted(set(mapped.values())):
        tensors.update(_read_safetensors(folder / Path(file).name))
    return tensors


def _read_safetensors(path):
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
