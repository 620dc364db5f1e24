"""The interfaces of models, and the passage between a module and its parameters.

A model's state is its parameters: randomness is a `key` argument, a cache is a value that is
returned. Everything outside `models/` handles parameters as one flat dict of arrays whose keys are
attribute paths (`blocks.0.attn.query.kernel`). Classes with subclasses here are abstract; the
models themselves are final.

Shape letters: B batch, T query time, S key time, D model width, V vocabulary, N new tokens, H
height, W width, C channels.
"""

import abc
import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from craft_jax.models import losses
from craft_jax.models.losses import PLAIN, LossConfig, LossSums, Sums

MAX_LOGITS = 1 << 27
"""Half a gigabyte of them in float32."""

Params = dict[str, jax.Array]


class Kernel(nnx.Param):
    """A matrix that a dense layer multiplies by; decoding may be given a `DecodeKernel` for it."""


class Constant(nnx.Param):
    """A parameter that is saved like the others and never trains."""


class Cache(Protocol):
    """The state of decoding between tokens: a named tuple of arrays with rows as first axis."""

    @property
    def length_B(self) -> jax.Array:
        """Tokens in each row, int32; smaller values drop the last tokens of a row."""

    def _replace(self, **fields: Any) -> Self:
        """Returns a copy with other values, `length_B` among them; a named tuple has it."""


class Model(nnx.Module):
    """Parameters, and a loss over a batch.

    Attributes:
      Config: the frozen dataclass that `__init__` takes; its fields are the config's `model`
        section, `name` among them.
      config: the one that this model was built from.
      takes_loss_config: whether `loss` takes `config`; a run that sets `loss.*` is refused where it
        does not. It speaks of one `loss`: a class that writes its own says it again.
      has_patches: whether `config.num_patches` is the number of positions of an image.
    """

    Config: type = object
    takes_loss_config: ClassVar[bool] = False
    has_patches: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        if "loss" in vars(cls) and "takes_loss_config" not in vars(cls):
            cls.takes_loss_config = False

    @abc.abstractmethod
    def __init__(self, config: Any, *, rngs: nnx.Rngs): ...

    @abc.abstractmethod
    def loss(
        self,
        batch: Mapping[str, jax.Array],
        *,
        key: jax.Array | None = None,
        remat: bool = False,
        config: LossConfig = PLAIN,
    ) -> Sums:
        """Returns the summed loss of a batch, and the sum of its weights.

        Args:
          batch: arrays with the batch as their first axis.
          key: randomness of dropout; None is deterministic.
          remat: recompute activations in the backward pass instead of keeping them.
          config: what is added as `penalty`; given only where `takes_loss_config`.
        """


class ImageModel(Model):
    """A model of images, float32 (B, H, W, C) in [-1, 1].

    It trains on the batches of `data.source=digits`, `images` and `tfds`: `images`, `weights` (B,),
    `seeds` (B,), which are random numbers that belong to the images, uint32, and `labels` (B,) if
    there are any. Fields of its config called `height`, `width`, `channels` and `num_classes` (0
    without labels) are those of the data where they are None.

    Attributes:
      generate_options: keywords of `generate` beside `given` and `key`, each with a default. The
        `generate` command sets `num_steps`, `solver` and `guidance`.
    """

    generate_options: ClassVar[tuple[str, ...]] = ()

    @abc.abstractmethod
    def generate(self, given: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Returns images (B, H, W, C), about in [-1, 1]: one for each label.

        Args:
          given: labels_B, int32; 0 where there are none.
          key: the randomness.
        """


class TokenModel(Model):
    """A model of token sequences: hidden states, and a head that turns them into logits.

    The two are apart because a prompt needs the logits of its last position only.
    """

    @abc.abstractmethod
    def init_cache(self, batch_size: int, max_len: int, dtype: Any) -> Cache:
        """Returns an empty cache for `batch_size` rows of up to `max_len` positions."""

    @abc.abstractmethod
    def hidden(
        self,
        tokens_BT: jax.Array,
        cache: Cache | None = None,
        *,
        segments_BT: jax.Array | None = None,
        positions_BT: jax.Array | None = None,
        key: jax.Array | None = None,
        remat: bool = False,
    ) -> tuple[jax.Array, Cache | None]:
        """Returns the final hidden states x_BTD and the cache with these tokens added.

        A model that knows no packed documents leaves `segments_BT` and `positions_BT` out of its
        signature: only batches that have them give them to it.

        Args:
          tokens_BT: int32 ids in [0, vocab_size).
          cache: holds the tokens before these; None if there are none.
          segments_BT: int32, the number of the document in its row that a token belongs to, from 1,
            and 0 for padding; a token reads tokens of its own segment only. None where each row is
            one document. Without a cache only.
          positions_BT: int32 in [0, max_seq_len), the place of a token in its document; None for
            that in its row. Without a cache only.
          key: randomness of dropout; None is deterministic.
          remat: recompute activations in the backward pass.

        Raises:
          ValueError: packed documents with a cache, or more tokens than positions.
        """

    @abc.abstractmethod
    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Returns logits_BTV of hidden states, in at least float32."""

    def __call__(
        self,
        tokens_BT: jax.Array,
        cache: Cache | None = None,
        key: jax.Array | None = None,
        **inputs: jax.Array,
    ) -> tuple[jax.Array, Cache | None]:
        """Returns logits_BTV, in at least float32, and the cache with these tokens added.

        Args:
          tokens_BT, cache, key: see `hidden`.
          **inputs: other keywords of `hidden`, such as the source of an encoder-decoder.
        """
        x_BTD, cache = self.hidden(tokens_BT, cache, key=key, **inputs)
        return self.logits(x_BTD), cache


class LanguageModel(TokenModel):
    """A model whose targets are the next tokens of its input."""

    takes_loss_config = True

    def loss(
        self,
        batch: Mapping[str, jax.Array],
        *,
        key: jax.Array | None = None,
        remat: bool = False,
        config: LossConfig = PLAIN,
    ) -> LossSums:
        """Returns the summed cross-entropy of `targets` (B, T) given `tokens` (B, T).

        Where a batch has `segments` and `positions` (B, T), its documents are packed: see `hidden`.
        Logits of more than `MAX_LOGITS` numbers never exist at once.
        """
        packing = {f"{name}_BT": batch[name] for name in ("segments", "positions") if name in batch}
        x_BTD, _ = self.hidden(batch["tokens"], key=key, remat=remat, **packing)
        targets_BT, weights_BT = batch["targets"], batch.get("weights")
        num_parts = self._num_parts(x_BTD)
        if num_parts == 1:
            return losses.cross_entropy(self.logits(x_BTD), targets_BT, weights_BT, config)
        missing = -x_BTD.shape[1] % num_parts
        if missing and weights_BT is None:
            weights_BT = jnp.ones(targets_BT.shape, jnp.float32)

        def split(array: jax.Array | None) -> jax.Array | None:
            """Cuts the time, since rows may be on different devices; what is missing weighs 0."""
            if array is None:
                return None
            room = [(0, missing if axis == 1 else 0) for axis in range(array.ndim)]
            B, T, *rest = (array := jnp.pad(array, room)).shape
            return jnp.moveaxis(array.reshape(B, num_parts, T // num_parts, *rest), 1, 0)

        def part(_: None, arrays: tuple) -> tuple[None, LossSums]:
            x_BtD, targets_Bt, weights_Bt = arrays
            sums = losses.cross_entropy(self.logits(x_BtD), targets_Bt, weights_Bt, config)
            return None, jax.tree.map(jnp.asarray, sums)

        # The backward pass makes the logits of a part again, instead of keeping those of all.
        _, sums = jax.lax.scan(
            jax.checkpoint(part), None, (split(x_BTD), split(targets_BT), split(weights_BT))
        )
        return jax.tree.map(lambda of_parts: of_parts.sum(axis=0), sums)

    def _num_parts(self, x_BTD: jax.Array) -> int:
        """Returns into how many parts of time the logits are cut."""
        shape_BTV = jax.eval_shape(self.logits, x_BTD).shape
        return min(math.ceil(math.prod(shape_BTV) / MAX_LOGITS), shape_BTV[1])


class EncoderDecoderModel(TokenModel):
    """A model of targets that each belong to a source.

    Without a cache, `hidden` and the call take the source as `source_BS` (int32) and
    `source_mask_BS` (bool, false for padding); a cache that `init_cache_from` made holds it. Its
    `loss` reads `source` and `source_mask` of a batch too, and returns `losses.PairSums`.
    """

    @abc.abstractmethod
    def encode(
        self,
        source_BS: jax.Array,
        source_mask_BS: jax.Array | None = None,
        *,
        key: jax.Array | None = None,
        remat: bool = False,
    ) -> jax.Array:
        """Returns what the decoder reads of a source: memory_BSD."""

    @abc.abstractmethod
    def init_cache_from(
        self, source_BS: jax.Array, source_mask_BS: jax.Array | None, max_len: int, dtype: Any
    ) -> Cache:
        """Returns a cache that holds the source, and targets of up to `max_len` tokens."""

    def init_cache(self, batch_size: int, max_len: int, dtype: Any) -> Cache:
        return self.init_cache_from(jnp.zeros((batch_size, 0), jnp.int32), None, max_len, dtype)


M = TypeVar("M", bound=Model)


@dataclasses.dataclass(frozen=True)
class ModelDef(Generic[M]):
    """A model without its parameters: what `split` leaves, and `merge` completes.

    Attributes:
      config: what the model was built from.
      graphdef, abstract_state: its structure, and its parameters without arrays.
    """

    config: Any
    graphdef: Any
    abstract_state: Any

    @property
    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and dtype of every parameter, by path."""
        return {
            _name(path): jax.ShapeDtypeStruct(leaf.get_value().shape, leaf.get_value().dtype)
            for path, leaf in nnx.to_flat_state(self.abstract_state)
        }

    @property
    def kernels(self) -> frozenset[str]:
        """The paths of the kernels of dense layers."""
        return self._paths(Kernel)

    @property
    def constants(self) -> frozenset[str]:
        """The paths of the parameters that never train."""
        return self._paths(Constant)

    def _paths(self, kind: type[nnx.Param]) -> frozenset[str]:
        leaves = nnx.to_flat_state(self.abstract_state)
        return frozenset(_name(path) for path, leaf in leaves if isinstance(leaf, kind))

    def merge(self, params: Mapping[str, jax.Array]) -> M:
        """Returns the model with these parameters.

        Raises:
          KeyError: a parameter is missing.
        """
        flat = [
            (path, leaf.replace(params[_name(path)]))
            for path, leaf in nnx.to_flat_state(self.abstract_state)
        ]
        return nnx.merge(self.graphdef, nnx.from_flat_state(flat))

    @property
    def num_params(self) -> int:
        """The number of parameters."""
        return sum(leaf.size for leaf in self.shapes.values())


def define(cls: type[M], config: Any) -> ModelDef[M]:
    """Returns the definition of `cls(config)` without making any array.

    Raises:
      TypeError: the model holds state that is not a parameter.
    """
    graphdef, state = nnx.split(nnx.eval_shape(lambda: cls(config, rngs=nnx.Rngs(0))))
    for path, leaf in nnx.to_flat_state(state):
        if not isinstance(leaf, nnx.Param):
            raise TypeError(
                f"{cls.__name__}.{_name(path)} is a {type(leaf).__name__}; a model's state is its "
                "parameters: pass keys as arguments and return caches"
            )
    return ModelDef(config, graphdef, state)


def init_params(cls: type[M], config: Any, key: jax.Array) -> Params:
    """Returns freshly drawn parameters of `cls(config)`, by path. A pure function: jit it."""
    return split(cls(config, rngs=nnx.Rngs(params=key)))


def split(model: Model) -> Params:
    """Returns the parameters of a model, by path."""
    state = nnx.state(model, nnx.Param)
    return {_name(path): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}


def _name(path: tuple) -> str:
    return ".".join(map(str, path))
