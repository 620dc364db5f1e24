"""A GPT written the straightforward way in Flax NNX, to time ours beside it.

What a user of NNX writes first: activations of three axes, the library's layers, attention, GELU
and optimizer, `nnx.jit`, and a donated state. `compare_peers.py` runs it; nothing else imports it.

Shape letters: B batch, T time, D model width, H heads, K head width, V vocabulary.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx


class Block(nnx.Module):
    """A pre-norm block."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs):
        self.heads = heads
        self.norm1 = nnx.LayerNorm(width, rngs=rngs)
        self.qkv = nnx.Linear(width, 3 * width, rngs=rngs)
        self.out = nnx.Linear(width, width, rngs=rngs)
        self.norm2 = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        B, T, D = x_BTD.shape
        q_BTD, k_BTD, v_BTD = jnp.split(self.qkv(self.norm1(x_BTD)), 3, axis=-1)
        q, k, v = (a.reshape(B, T, self.heads, D // self.heads) for a in (q_BTD, k_BTD, v_BTD))
        y_BTHK = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x_BTD = x_BTD + self.out(y_BTHK.reshape(B, T, D))
        return x_BTD + self.down(nnx.gelu(self.up(self.norm2(x_BTD)), approximate=False))


class PlainGPT(nnx.Module):
    """Tokens (B, T) to logits (B, T, V), with tied embeddings."""

    def __init__(
        self, layers: int, heads: int, width: int, context: int, vocabulary: int, rngs: nnx.Rngs
    ):
        init = nnx.initializers.normal(0.02)
        self.tokens = nnx.Embed(vocabulary, width, embedding_init=init, rngs=rngs)
        self.positions = nnx.Embed(context, width, embedding_init=init, rngs=rngs)
        self.blocks = nnx.List([Block(width, heads, rngs) for _ in range(layers)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        x_BTD = self.tokens(tokens_BT) + self.positions(jnp.arange(tokens_BT.shape[1]))
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return self.tokens.attend(self.norm(x_BTD))


def make_step(
    layers: int, heads: int, width: int, context: int, vocabulary: int
) -> Callable[[np.ndarray, np.ndarray], float]:
    """Returns a function from tokens and targets (B, T) to the loss of one step of training."""
    model = PlainGPT(layers, heads, width, context, vocabulary, nnx.Rngs(0))
    chain = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, 0.9, 0.95))
    optimizer = nnx.Optimizer(model, chain, wrt=nnx.Param)

    @nnx.jit(donate_argnums=(0, 1))
    def train_step(
        model: PlainGPT, optimizer: nnx.Optimizer, tokens_BT: jax.Array, targets_BT: jax.Array
    ) -> jax.Array:
        def loss(model: PlainGPT) -> jax.Array:
            logits_BTV = model(tokens_BT)
            return optax.softmax_cross_entropy_with_integer_labels(logits_BTV, targets_BT).mean()

        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

    def step(tokens_BT: np.ndarray, targets_BT: np.ndarray) -> float:
        return float(train_step(model, optimizer, tokens_BT, targets_BT))

    return step
