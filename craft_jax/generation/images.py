"""Images from a model, and the missing half of images, whatever kind of model it is.

Labels flow in, uint8 images flow out. A language model of pixels goes the way of all language
models, through `generation`; an `ImageModel` makes whole images. Shapes: N images, H height, W
width, C channels, T pixels of an image, L labels.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from craft_jax.data.images.conversion import to_uint8
from craft_jax.data.images.format import ImageFormat
from craft_jax.errors import UsageError
from craft_jax.generation.generator import Generator
from craft_jax.generation.sampling import SamplingConfig
from craft_jax.models import losses
from craft_jax.models.base import ImageModel, LanguageModel, ModelDef, Params

AT_ONCE = 256
"""Images that are made at the same time; more would only take more memory."""


class ImageGenerator:
    """Makes images with one architecture; compiled functions are kept between calls.

    Args:
      model_class, model_def: the model, which knows images.
      images: what they are; with a palette for a language model.

    Raises:
      UsageError: the model makes no images.
    """

    def __init__(self, model_class: type, model_def: ModelDef, images: ImageFormat):
        self._class, self._model_def, self.images = model_class, model_def, images
        if issubclass(model_class, LanguageModel):
            self._generator = Generator(
                model_def,
                max_len=images.num_pixels,
                vocab_size=images.num_colors,
                end_id=None,
            )
            self._likelihoods = jax.jit(self._likelihoods_on_device)
            return
        if not issubclass(model_class, ImageModel):
            raise UsageError(f"model.name={model_def.config.name} is no model that makes images")
        self._make = functools.cache(self._compiled)

    @property
    def reads_pixels(self) -> bool:
        """Returns whether it goes on from pixels, so that it can complete an image."""
        return issubclass(self._class, LanguageModel)

    @property
    def options(self) -> tuple[str, ...]:
        """The names of what may be chosen, beside labels and seed."""
        if self.reads_pixels:
            return tuple(field.name for field in dataclasses.fields(SamplingConfig))
        return self._class.generate_options

    def generate(
        self, params: Params, labels: Sequence[int], *, seed: int = 0, **options: Any
    ) -> np.ndarray:
        """Returns an image for each label, uint8 (N, H, W, C).

        Image n is a function of its label, `seed` and n, as far as that of a model's own `generate`
        is one of its label, the key and its place.

        Args:
          params: in the dtype that computes.
          labels: numbers of classes; 0 for images without.
          seed: of the randomness, in [0, 2**32).
          **options: of a language model, see `SamplingConfig`; else keywords of its `generate`.

        Raises:
          UsageError: an impossible value, or an option that this model does not have.
        """
        self._check(labels, seed, options)
        made = []
        for first in range(0, len(labels), AT_ONCE):
            part = np.asarray(labels[first : first + AT_ONCE], np.int32)
            if self.reads_pixels:
                prompts = [[int(token)] for token in self.images.first_tokens(part)]
                made.append(self._from_pixels(params, prompts, first, seed, options))
                continue
            try:
                make = self._make(tuple(sorted(options.items())))
                images = make(params, part, np.uint32(seed), np.uint32(first))
            except ValueError as error:
                raise UsageError(str(error)) from None
            made.append(to_uint8(np.asarray(images)))
        return np.concatenate(made)

    def complete(
        self,
        params: Params,
        images_NHWC: np.ndarray,
        labels: Sequence[int | None],
        *,
        num_rows: int,
        seed: int = 0,
        **options: Any,
    ) -> np.ndarray:
        """Returns images whose first rows of pixels are given, uint8 (N, H, W, C).

        Where no label is given, one is drawn by how likely each makes those rows.

        Args:
          params: in the dtype that computes.
          images_NHWC: uint8; only their first `num_rows` rows are read.
          labels: of each, a number or None.
          num_rows: from 1 to H - 1.
          seed, **options: as for `generate`.

        Raises:
          UsageError: as for `generate`; also a model that makes whole images only.
        """
        if not self.reads_pixels:
            raise UsageError(
                f"model.name={self._model_def.config.name} makes whole images; a gpt completes them"
            )
        self._check([label or 0 for label in labels], seed, options)
        tokens_NT = self.images.tokens(images_NHWC)[:, : num_rows * self.images.width]
        made = []
        for first in range(0, len(labels), AT_ONCE):
            part = slice(first, first + AT_ONCE)
            chosen = self._labels(params, tokens_NT[part], labels[part], seed, first)
            firsts = self.images.first_tokens(chosen)
            prompts = [[int(f), *row] for f, row in zip(firsts, tokens_NT[part], strict=True)]
            made.append(self._from_pixels(params, prompts, first, seed, options))
        return np.concatenate(made)

    def _check(self, labels: Sequence[int], seed: int, options: Mapping[str, Any]) -> None:
        if not 0 <= seed < 2**32:
            raise UsageError(f"`seed={seed}` must be from 0 to {2**32 - 1}")
        if not labels:
            raise UsageError("no image is asked for: give labels")
        most = max(1, self.images.num_classes)
        if wrong := [label for label in labels if not 0 <= label < most]:
            raise UsageError(f"label {wrong[0]} is none of the {most} classes, from 0")
        for name in options:
            if name not in self.options:
                have = ", ".join(f"--{option}" for option in self.options)
                raise UsageError(
                    f"--{name} is nothing that model.name={self._model_def.config.name} knows; it "
                    f"has {have or 'no options'}"
                )

    # A model of whole images.

    def _compiled(self, options: tuple[tuple[str, Any], ...]) -> Any:
        def make(params: Params, labels_N: jax.Array, seed: jax.Array, first: jax.Array) -> Any:
            key = jax.random.fold_in(jax.random.key(seed), first)
            return self._model_def.merge(params).generate(labels_N, key, **dict(options))

        return jax.jit(make)

    # A language model of pixels.

    def _from_pixels(
        self,
        params: Params,
        prompts: list[list[int]],
        first: int,
        seed: int,
        options: Mapping[str, Any],
    ) -> np.ndarray:
        """Goes on from first tokens and pixels; returns whole images."""
        made = self._generator.generate(
            params,
            prompts,
            max_new_tokens=self.images.num_pixels + 1 - len(prompts[0]),
            config=SamplingConfig(**options),
            seed=seed,
            sample_index=range(first, first + len(prompts)),
        )
        rows = [[*prompt[1:], *new] for prompt, new in zip(prompts, made, strict=True)]
        return self.images.pixels(np.array(rows))

    def _labels(
        self,
        params: Params,
        tokens_NT: np.ndarray,
        labels: Sequence[int | None],
        seed: int,
        first: int,
    ) -> np.ndarray:
        """Returns labels, those that are None drawn by the likelihood of the pixels, int (N,)."""
        if self.images.num_classes < 2 or None not in labels:
            return np.array([label or 0 for label in labels])
        every_L = np.arange(self.images.num_classes)
        log_NL = np.stack(
            [
                np.asarray(self._likelihoods(params, tokens_NT, first_token))
                for first_token in self.images.first_tokens(every_L)
            ],
            axis=1,
        )
        # The largest of log-likelihood plus Gumbel noise is a draw from the softmax.
        rngs = [np.random.default_rng([seed, first + n]) for n in range(len(labels))]
        noise_NL = np.stack([rng.gumbel(size=len(every_L)) for rng in rngs])
        drawn_N = (log_NL + noise_NL).argmax(axis=1)
        given_N = np.array([-1 if label is None else label for label in labels])
        return np.where(given_N < 0, drawn_N, given_N)

    def _likelihoods_on_device(
        self, params: Params, tokens_NT: jax.Array, first_token: jax.Array
    ) -> jax.Array:
        """Returns the log-likelihood of the pixels of each row, behind a first token."""
        model = self._model_def.merge(params)
        first_N1 = jnp.full((len(tokens_NT), 1), first_token, tokens_NT.dtype)
        logits_NTV, _ = model(jnp.concatenate([first_N1, tokens_NT[:, :-1]], axis=1))

        def row(logits_TV: jax.Array, targets_T: jax.Array) -> jax.Array:
            return -losses.cross_entropy(logits_TV[None], targets_T[None]).loss

        return jax.vmap(row)(logits_NTV, tokens_NT)
