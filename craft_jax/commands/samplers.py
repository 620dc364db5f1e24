"""What a run shows of its model while it is being trained."""

from itertools import groupby

from craft_jax import runs, sharding
from craft_jax.config import ExperimentConfig
from craft_jax.data.pipeline import Datasets
from craft_jax.data.tokenizers import Tokenizer
from craft_jax.generation import SamplingConfig
from craft_jax.models.base import GenerativeModel, ModelDef, Params
from craft_jax.precision import Policy
from craft_jax.training.state import TrainState

_LAST_SAMPLE_FACTOR = 4
_SAMPLED_PAIRS = 5
_SAMPLING = SamplingConfig(temperature=0.8)


class Sampler:
    """Text from a state that is being trained."""

    source: str | None = None

    def __init__(self, config: ExperimentConfig, model_def: ModelDef, tokenizer: Tokenizer):
        self._generator = runs.make_generator(config, model_def, tokenizer, stop_at_end=False)
        self._policy = Policy.named(config.training.precision)
        self._num_tokens, self._tokenizer = config.training.sample_tokens, tokenizer

    def __call__(self, state: TrainState, is_last: bool = False) -> str:
        new = self._generator.generate(
            _sampling_params(state, self._policy),
            [runs.prompt_ids(self._tokenizer, "")],
            max_new_tokens=self._num_tokens * (_LAST_SAMPLE_FACTOR if is_last else 1),
            config=_SAMPLING,
            seed=int(state.step),
        )
        end = self._tokenizer.end_id
        documents = [
            list(part) for is_end, part in groupby(new[0], lambda t: t == end) if not is_end
        ]
        return "\n".join(map(self._tokenizer.decode, documents))


class PairSampler:
    """Targets of some sources that validate, from a state that is being trained.

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

    def __call__(self, state: TrainState, is_last: bool = False) -> str:
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
        return "\n".join(lines)


def make(
    config: ExperimentConfig, model_def: ModelDef, datasets: Datasets
) -> Sampler | PairSampler | None:
    """Returns a sampler, or None where there is no text or the model does not generate."""
    tokenizer = datasets.train.tokenizer
    if tokenizer is None or not issubclass(config.model_class, GenerativeModel):
        return None
    if config.reads_pairs:
        return PairSampler(config, model_def, datasets, tokenizer)
    return Sampler(config, model_def, tokenizer)


def _sampling_params(state: TrainState, policy: Policy) -> Params:
    """Returns the parameters on one device, in the dtype that computes."""
    return policy.cast(sharding.on_one_device(dict(state.best_params)))


def look_on(state: TrainState) -> str:
    """Takes part in a sample that the first of several processes makes."""
    sharding.on_one_device(dict(state.best_params))
    return ""
