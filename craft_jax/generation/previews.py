"""Samples from a model while it trains: text, pairs or images."""

from itertools import groupby

from craft_jax import runs
from craft_jax.config import ExperimentConfig
from craft_jax.data.images.conversion import shown
from craft_jax.data.images.format import ImageFormat
from craft_jax.data.pipeline import Datasets
from craft_jax.data.tokenizers import Tokenizer
from craft_jax.generation import prompts
from craft_jax.generation.images import ImageGenerator
from craft_jax.generation.sampling import SamplingConfig
from craft_jax.models.base import ImageModel, ModelDef, Params, TokenModel
from craft_jax.parallel import sharding
from craft_jax.training.callbacks import Sample
from craft_jax.training.precision import Policy
from craft_jax.training.state import TrainState

_LAST_SAMPLE_FACTOR = 4
_SAMPLED_PAIRS = 5
_COLUMNS, _ROWS = 10, 4
_SAMPLING = SamplingConfig(temperature=0.8)


class TextSampler:
    """Text from the state in training."""

    source: str | None = None

    def __init__(self, config: ExperimentConfig, model_def: ModelDef, tokenizer: Tokenizer):
        self._generator = runs.make_generator(config, model_def, tokenizer, stop_at_end=False)
        self._policy = Policy.named(config.training.precision)
        self._num_tokens, self._tokenizer = config.training.sample_tokens, tokenizer

    def __call__(self, state: TrainState, is_last: bool = False) -> Sample:
        new = self._generator.generate(
            _sampling_params(state, self._policy),
            [prompts.prompt_ids(self._tokenizer, "")],
            max_new_tokens=self._num_tokens * (_LAST_SAMPLE_FACTOR if is_last else 1),
            config=_SAMPLING,
            seed=int(state.step),
        )
        end = self._tokenizer.end_id
        documents = [
            list(part) for is_end, part in groupby(new[0], lambda t: t == end) if not is_end
        ]
        return Sample(words="\n".join(map(self._tokenizer.decode, documents)))


class PairSampler:
    """Targets of some sources of the validation split, from the state in training.

    Attributes:
      source: the text of one of them.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        model_def: ModelDef,
        datasets: Datasets,
        tokenizer: Tokenizer,
    ):
        self._generator = runs.make_generator(config, model_def, tokenizer)
        self._policy = Policy.named(config.training.precision)
        batch = (datasets.val or datasets.train).batch(0)
        rows = [n for n, weights in enumerate(batch["weights"]) if weights.any()][:_SAMPLED_PAIRS]
        self._sources = [batch["source"][n][batch["source_mask"][n]].tolist() for n in rows]
        self._starts = [batch["tokens"][n][:1].tolist() for n in rows]
        self._num_tokens = min(batch["targets"].shape[1], config.training.sample_tokens)
        self._tokenizer = tokenizer
        self._source_texts = [tokenizer.decode(ids) for ids in self._sources]
        self._targets = [
            tokenizer.decode(batch["targets"][n][batch["weights"][n] > 0]) for n in rows
        ]
        self.source = self._source_texts[0]

    def __call__(self, state: TrainState, is_last: bool = False) -> Sample:
        del is_last  # The same pairs every time, so that they can be compared.
        made = self._generator.generate(
            _sampling_params(state, self._policy),
            self._starts,
            sources=self._sources,
            max_new_tokens=self._num_tokens,
            config=SamplingConfig(temperature=0.0),
        )
        lines = []
        for source, new, right in zip(self._source_texts, made, self._targets, strict=True):
            text = self._tokenizer.decode(new)
            lines.append(f"{source} -> {text}" + ("" if text == right else f"  (right: {right})"))
        return Sample(words="\n".join(lines))


class ImageSampler:
    """Images from the state in training, a column for each of some classes."""

    source: str | None = None

    def __init__(self, config: ExperimentConfig, model_def: ModelDef, images: ImageFormat):
        self._generator = ImageGenerator(config.model_class, model_def, images)
        self._policy = Policy.named(config.training.precision)
        self._num_columns = min(images.num_classes or _COLUMNS, _COLUMNS)
        self._labels = list(range(self._num_columns)) if images.num_classes else [0] * _COLUMNS
        self._names = ", ".join(images.label_names[: self._num_columns])

    def __call__(self, state: TrainState, is_last: bool = False) -> Sample:
        labels = self._labels * (_ROWS * (2 if is_last else 1))
        params = _sampling_params(state, self._policy)
        made = self._generator.generate(params, labels, seed=int(state.step))
        words = f"{len(labels)} images" + (f", in columns {self._names}" if self._names else "")
        return Sample(words=words, picture=shown(made, self._num_columns))


Sampler = TextSampler | PairSampler | ImageSampler


def make(config: ExperimentConfig, model_def: ModelDef, datasets: Datasets) -> Sampler | None:
    """Returns a sampler, or None where nothing can be shown, or the model does not generate."""
    if not issubclass(config.model_class, (ImageModel, TokenModel)):
        return None
    images, tokenizer = datasets.train.image_format, datasets.train.tokenizer
    if images is not None:
        return ImageSampler(config, model_def, images)
    if tokenizer is None or not issubclass(config.model_class, TokenModel):
        return None
    if config.reads_pairs:
        return PairSampler(config, model_def, datasets, tokenizer)
    return TextSampler(config, model_def, tokenizer)


def _sampling_params(state: TrainState, policy: Policy) -> Params:
    """Returns the parameters on one device, in the dtype that computes."""
    return policy.cast(sharding.on_one_device(dict(state.eval_params)))


def look_on(state: TrainState) -> Sample:
    """Takes part in a sample that the first of several processes makes."""
    sharding.on_one_device(dict(state.eval_params))
    return Sample(words="")
