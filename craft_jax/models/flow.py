"""Flow: a transformer that turns noise into images along straight lines (flow matching).

Images, times and labels flow in, velocities flow out. A point on the way from noise x0 to an image
x1 is x_t = (1 - t) x0 + t x1, and the velocity there x1 - x0; the model predicts its mean given x_t
(Lipman et al. 2023, arXiv:2210.02747; rectified flow, Liu et al. 2023, arXiv:2209.03003). Samples
follow the predicted velocities from t = 0 to 1. The network is a DiT (Peebles and Xie 2023,
arXiv:2212.09748): patches, and blocks that time and class steer by layer norms whose scale, shift
and gate begin at zero.

Shape letters: B images, H height, W width, C channels, T patches, P numbers in a patch, D model
width, F frequencies.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Literal, final

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from craft_jax.models.base import ImageModel
from craft_jax.models.blocks import MLP, Attention, split_keys
from craft_jax.models.gpt import heads_divide
from craft_jax.models.layers import Embedding, Linear, dropout, layer_norm, silu
from craft_jax.models.losses import MeanSums
from craft_jax.models.numerics import accum_dtype
from craft_jax.schema import MAX_LAYERS, MAX_WIDTH, Contradiction, setting

NUM_FREQUENCIES = 128
"""Sines, and as many cosines, of the time."""
EPS = 1e-6
"""Of the layer norms."""
SOLVERS = ("euler", "heun")
MAX_STEPS = 10_000
GUIDANCE = 1.5
"""The default where there are classes: clearer images, hardly less various."""

_FROM_DATA = "none for that of the data"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """The architecture of a `Flow`, and how its times are drawn."""

    name: str = setting("flow", "flow")
    height: int | None = setting(None, f"of an image; {_FROM_DATA}", minimum=1, maximum=4096)
    width: int | None = setting(None, f"of an image; {_FROM_DATA}", minimum=1, maximum=4096)
    channels: int | None = setting(None, f"of an image, 1 or 3; {_FROM_DATA}", minimum=1, maximum=4)
    num_classes: int | None = setting(
        None, f"labels; 0 for images without; {_FROM_DATA}", minimum=0, maximum=1_000_000
    )
    patch_size: int = setting(
        2, "height and width of a patch, which is what attention sees", minimum=1, maximum=4096
    )
    num_layers: int = setting(6, "blocks", minimum=1, maximum=MAX_LAYERS)
    num_heads: int = setting(
        4, "attention heads; must divide d_model", minimum=1, maximum=MAX_WIDTH
    )
    d_model: int = setting(128, "width of the residual stream", minimum=1, maximum=MAX_WIDTH)
    d_ff: int | None = setting(
        None, "hidden width of the MLP; none for 4 * d_model", minimum=1, maximum=4 * MAX_WIDTH
    )
    dropout: float = setting(
        0.0, "probability of zeroing attention and residuals", minimum=0, below=1
    )
    label_dropout: float = setting(
        0.1,
        "probability of training on an image without its label, which guidance needs",
        minimum=0,
        below=1,
    )
    times: Literal["uniform", "logit_normal"] = setting(
        "uniform",
        "how times are drawn: uniform, or logit_normal, which prefers the middle",
    )

    def contradictions(self) -> Iterator[Contradiction]:
        yield from heads_divide(self)
        for field in ("height", "width"):
            size = getattr(self, field)
            if size is not None and size % self.patch_size:
                yield Contradiction(
                    (f"model.{field}", "model.patch_size"),
                    f"model.patch_size={self.patch_size} does not divide model.{field}={size}; "
                    "use a divisor of it",
                )

    @property
    def hidden_width(self) -> int:
        """The hidden width of the MLP."""
        return self.d_ff or 4 * self.d_model

    @property
    def num_patches(self) -> int:
        """The number of patches of an image, T."""
        return self.height // self.patch_size * (self.width // self.patch_size)

    @property
    def patch_width(self) -> int:
        """The number of values in a patch, P."""
        return self.patch_size**2 * self.channels


class TimeEmbedding(nnx.Module):
    """A vector for a time in [0, 1]: an MLP of its sines and cosines."""

    def __init__(self, d_model: int, *, rngs: nnx.Rngs):
        self.up = Linear(2 * NUM_FREQUENCIES, d_model, rngs=rngs)
        self.down = Linear(d_model, d_model, rngs=rngs)

    def __call__(self, t_B: jax.Array) -> jax.Array:
        """Returns c_BD in the dtype of the parameters; sines are in at least float32."""
        accum = accum_dtype(t_B.dtype)
        # Angular frequencies from 0.1 to 1000, as for the steps of a diffusion model.
        rate_F = 1000 * np.exp(-math.log(10000) * np.arange(NUM_FREQUENCIES) / NUM_FREQUENCIES)
        angle_BF = t_B.astype(accum)[:, None] * jnp.asarray(rate_F, accum)[None, :]
        features_BF = jnp.concatenate([jnp.cos(angle_BF), jnp.sin(angle_BF)], axis=-1)
        return self.down(silu(self.up(features_BF.astype(self.up.kernel.dtype))))


class Block(nnx.Module):
    """x + gate * attention(norm(x)), then the same with an MLP; norms and gates by condition."""

    def __init__(self, config: FlowConfig, *, rngs: nnx.Rngs):
        d = config.d_model
        self.modulation = Linear(d, 6 * d, init_std=0.0, rngs=rngs)
        self.attn = Attention(d, config.num_heads, use_bias=True, dropout=config.dropout, rngs=rngs)
        self.mlp = MLP(d, config.hidden_width, activation="gelu_tanh", use_bias=True, rngs=rngs)
        self.dropout = config.dropout

    def __call__(
        self, x_BTD: jax.Array, c_BD: jax.Array, key: jax.Array | None = None
    ) -> jax.Array:
        attn_key, residual_key, mlp_key = split_keys(key, 3)
        parts = jnp.split(self.modulation(silu(c_BD))[:, None, :], 6, axis=-1)
        shift_B1D, scale_B1D, gate_B1D, mlp_shift_B1D, mlp_scale_B1D, mlp_gate_B1D = parts
        everything_111 = jnp.ones((1, 1, 1), bool)
        h_BTD = modulated(x_BTD, shift_B1D, scale_B1D)
        y_BTD, _ = self.attn(h_BTD, key=attn_key, visible_BTS=everything_111)
        x_BTD = x_BTD + gate_B1D * dropout(y_BTD, self.dropout, residual_key)
        y_BTD = self.mlp(modulated(x_BTD, mlp_shift_B1D, mlp_scale_B1D))
        return x_BTD + mlp_gate_B1D * dropout(y_BTD, self.dropout, mlp_key)


def modulated(x_BTD: jax.Array, shift_B1D: jax.Array, scale_B1D: jax.Array) -> jax.Array:
    """Layer norm with a given shift and scale; the scale is an offset from 1."""
    ones_D = jnp.ones(x_BTD.shape[-1:], x_BTD.dtype)
    return layer_norm(x_BTD, ones_D, None, EPS) * (1 + scale_B1D) + shift_B1D


@final
class Flow(ImageModel):
    """Images from noise, given their class or not: `FlowConfig` says how."""

    Config = FlowConfig
    has_patches = True
    generate_options = ("num_steps", "solver", "guidance")

    def __init__(self, config: FlowConfig, *, rngs: nnx.Rngs):
        sizes = (config.height, config.width, config.channels, config.num_classes)
        assert None not in sizes, "sizes of images come from the data"
        self.config = config
        d = config.d_model
        self.patch_embedding = Linear(config.patch_width, d, rngs=rngs)
        self.position_embedding = Embedding(config.num_patches, d, rngs=rngs)
        self.time_embedding = TimeEmbedding(d, rngs=rngs)
        # The last row means no label.
        self.label_embedding = (
            Embedding(config.num_classes + 1, d, rngs=rngs) if config.num_classes else None
        )
        self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(config.num_layers)])
        self.final_modulation = Linear(d, 2 * d, init_std=0.0, rngs=rngs)
        self.head = Linear(d, config.patch_width, init_std=0.0, rngs=rngs)

    def __call__(
        self,
        x_BHWC: jax.Array,
        t_B: jax.Array,
        labels_B: jax.Array | None = None,
        key: jax.Array | None = None,
        remat: bool = False,
    ) -> jax.Array:
        """Returns velocities v_BHWC, in at least float32.

        Args:
          x_BHWC: points on the way, any float dtype.
          t_B: where on the way, in [0, 1].
          labels_B: int32 in [0, num_classes]; `num_classes` and None stand for no label.
          key: randomness of dropout; None is deterministic.
          remat: recompute activations in the backward pass.
        """
        config = self.config
        keys = split_keys(key if config.dropout else None, len(self.blocks))
        x_BTP = patches(x_BHWC, config.patch_size)
        positions_TD = self.position_embedding(jnp.arange(config.num_patches))
        x_BTD = self.patch_embedding(x_BTP.astype(positions_TD.dtype)) + positions_TD[None]
        c_BD = self.time_embedding(t_B)
        if self.label_embedding is not None:
            if labels_B is None:
                labels_B = jnp.full(t_B.shape, config.num_classes)
            c_BD = c_BD + self.label_embedding(labels_B)
        apply = nnx.remat(Block.__call__) if remat else Block.__call__
        for block, block_key in zip(self.blocks, keys, strict=True):
            x_BTD = apply(block, x_BTD, c_BD, block_key)
        shift_B1D, scale_B1D = jnp.split(self.final_modulation(silu(c_BD))[:, None, :], 2, axis=-1)
        v_BTP = self.head(modulated(x_BTD, shift_B1D, scale_B1D))
        v_BTP = v_BTP.astype(accum_dtype(v_BTP.dtype))
        return unpatched(v_BTP, x_BHWC.shape, config.patch_size)

    def loss(
        self,
        batch: Mapping[str, jax.Array],
        *,
        key: jax.Array | None = None,
        remat: bool = False,
    ) -> MeanSums:
        """Returns the summed mean squared error of the velocities of `images` (B, H, W, C).

        Noise, time and whether the label is left out are functions of an image's number in `seeds`
        (B,), so that they do not depend on how a batch is split; without a key no label is left
        out. Reads `labels` (B,) and `weights` (B,) where there are any.
        """
        config, x1_BHWC = self.config, batch["images"]
        accum = accum_dtype(self.head.kernel.dtype)
        x1_BHWC = x1_BHWC.astype(accum)
        seeds_B = batch["seeds"] if "seeds" in batch else jnp.arange(len(x1_BHWC))

        def draw(seed: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            noise_key, time_key, label_key = jax.random.split(jax.random.key(seed), 3)
            normal_HWC = jax.random.normal(noise_key, x1_BHWC.shape[1:], accum)
            if config.times == "uniform":
                t = jax.random.uniform(time_key, (), accum)
            else:
                t = jax.nn.sigmoid(jax.random.normal(time_key, (), accum))
            return normal_HWC, t, jax.random.bernoulli(label_key, config.label_dropout)

        x0_BHWC, t_B, is_dropped_B = jax.vmap(draw)(seeds_B.astype(jnp.uint32))
        labels_B = batch.get("labels")
        if labels_B is not None and key is not None:
            labels_B = jnp.where(is_dropped_B, config.num_classes, labels_B)
        t_B111 = t_B[:, None, None, None]
        x_BHWC = (1 - t_B111) * x0_BHWC + t_B111 * x1_BHWC
        v_BHWC = self(x_BHWC, t_B, labels_B, key, remat)
        losses_B = jnp.mean((v_BHWC - (x1_BHWC - x0_BHWC)) ** 2, axis=(1, 2, 3))
        weights_B = batch.get("weights")
        if weights_B is None:
            return MeanSums(losses_B.sum(), jnp.asarray(len(losses_B), accum))
        weights_B = weights_B.astype(accum)
        return MeanSums((losses_B * weights_B).sum(), weights_B.sum())

    def generate(
        self,
        given: jax.Array,
        key: jax.Array | None = None,
        *,
        noise_BHWC: jax.Array | None = None,
        num_steps: int = 50,
        solver: str = "heun",
        guidance: float | None = None,
    ) -> jax.Array:
        """Returns an image for each label.

        Args:
          given: labels_B, int32 in [0, num_classes]; `num_classes` for none in particular.
          key: of the noise; None where `noise_BHWC` is given.
          noise_BHWC: where the way begins; at least float32. Its dtype is that of the result.
          num_steps: of equal length, N.
          solver: `euler`, N evaluations of the model; or `heun`, 2 N, whose error is of higher
            order (Karras et al. 2022, arXiv:2206.00364, algorithm 1).
          guidance: w of v = v_none + w (v_label - v_none) (Ho and Salimans 2022,
            arXiv:2207.12598); 1 for none, which takes half the time; None for 1.5 where the model
            was trained for guidance, else 1.

        Returns:
          x_BHWC, about in [-1, 1], not clipped.

        Raises:
          ValueError: an unknown solver, steps or guidance out of range, or guidance without
            `label_dropout`.
        """
        config, B, guidance = self.config, len(given), self._checked_guidance(guidance)
        if solver not in SOLVERS:
            raise ValueError(f"solver={solver!r} is not one of {', '.join(SOLVERS)}")
        if not 1 <= num_steps <= MAX_STEPS:
            raise ValueError(f"num_steps={num_steps} is not from 1 to {MAX_STEPS}")
        if noise_BHWC is None:
            dtype = accum_dtype(self.head.kernel.dtype)
            shape_HWC = (config.height, config.width, config.channels)
            # One key per image, so that an image does not depend on their number.
            keys_B = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(B))
            noise_BHWC = jax.vmap(lambda k: jax.random.normal(k, shape_HWC, dtype))(keys_B)

        def velocity(x_BHWC: jax.Array, t: jax.Array) -> jax.Array:
            if guidance == 1.0:
                return self(x_BHWC, jnp.full((B,), t), given)
            labels = jnp.concatenate([given, jnp.full_like(given, config.num_classes)])
            v = self(jnp.concatenate([x_BHWC, x_BHWC]), jnp.full((2 * B,), t), labels)
            with_BHWC, without_BHWC = jnp.split(v, 2)
            return without_BHWC + guidance * (with_BHWC - without_BHWC)

        def step(x_BHWC: jax.Array, number: jax.Array) -> tuple[jax.Array, None]:
            dtype = x_BHWC.dtype
            start, end = (n.astype(dtype) / num_steps for n in (number, number + 1))
            v_BHWC = velocity(x_BHWC, start)
            if solver == "heun":
                there_BHWC = velocity(x_BHWC + (end - start) * v_BHWC, end)
                v_BHWC = (v_BHWC + there_BHWC) / 2
            return (x_BHWC + (end - start) * v_BHWC).astype(dtype), None

        return jax.lax.scan(step, noise_BHWC, jnp.arange(num_steps))[0]

    def _checked_guidance(self, guidance: float | None) -> float:
        """Returns the guidance, or the default for None; raises a ValueError for another."""
        config = self.config
        can_guide = bool(config.num_classes) and config.label_dropout > 0
        if guidance is None:
            guidance = GUIDANCE if can_guide else 1.0
        if not math.isfinite(guidance):
            raise ValueError(f"guidance={guidance} is not a finite number")
        if guidance != 1.0 and not can_guide:
            raise ValueError(
                f"guidance={guidance}: the model was not trained without labels "
                f"(model.label_dropout={config.label_dropout}, num_classes={config.num_classes}); "
                "leave it out"
            )
        return guidance


def patches(x_BHWC: jax.Array, size: int) -> jax.Array:
    """Cuts images into squares, row by row: x_BTP, each by rows, columns and channels."""
    B, H, W, C = x_BHWC.shape
    x = x_BHWC.reshape(B, H // size, size, W // size, size, C).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(B, H // size * (W // size), size * size * C)


def unpatched(x_BTP: jax.Array, shape_BHWC: tuple[int, ...], size: int) -> jax.Array:
    """Inverts `patches`."""
    B, H, W, C = shape_BHWC
    x = x_BTP.reshape(B, H // size, W // size, size, size, C).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(shape_BHWC)
