"""How the next token is chosen from logits."""

import dataclasses

import jax
import jax.numpy as jnp

from craft_jax.errors import UsageError


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the next token is chosen; the filters apply in the order in which they stand here.

    Attributes:
      repetition_penalty: divides positive and multiplies negative logits of tokens seen before
        (Keskar et al. 2019); 1 for none. From 0.001 to 1000.
      temperature: divides the logits; 0 takes the most likely token. Else from 0.001 to 1000.
      top_k: keeps the k most likely tokens; None for all.
      top_p: keeps the smallest set of most likely tokens with at least this probability (Holtzman
        et al. 2020); 1 for all.
      min_p: drops tokens below this fraction of the most likely one's probability; 0 for none.
    """

    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0

    def check(self, vocab_size: int) -> None:
        """Checks every value.

        Raises:
          UsageError: names all that are impossible.
        """
        wrong = [
            f"--{name}={value} must be {demand}"
            for name, value, possible, demand in (
                # Far outside, float32 has no room: all logits become infinite, or nan.
                ("temperature", self.temperature,
                 self.temperature == 0 or 1e-3 <= self.temperature <= 1e3,
                 "0 (most likely token), or from 0.001 to 1000"),
                ("top_k", self.top_k, self.top_k is None or 1 <= self.top_k <= vocab_size,
                 f"from 1 to the vocabulary's {vocab_size}"),
                ("top_p", self.top_p, 0 < self.top_p <= 1, "greater than 0 and at most 1"),
                ("min_p", self.min_p, 0 <= self.min_p <= 1, "from 0 to 1"),
                ("repetition_penalty", self.repetition_penalty,
                 1e-3 <= self.repetition_penalty <= 1e3, "from 0.001 to 1000; 1 for none"),
            )
            if not possible
        ]  # fmt: skip
        if wrong:
            raise UsageError("; ".join(wrong))


def choose(
    logits_BV: jax.Array, seen_BV: jax.Array, keys_B: jax.Array, config: SamplingConfig
) -> jax.Array:
    """Chooses the next token of each row.

    Args:
      logits_BV: float32 or float64.
      seen_BV: bool, whether the row holds the token already.
      keys_B: a key for each row.
      config: how.

    Returns:
      int32 (B,).
    """
    if config.repetition_penalty != 1.0:
        penalty = config.repetition_penalty
        punished_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
        logits_BV = jnp.where(seen_BV, punished_BV, logits_BV)
    if config.temperature == 0.0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = logits_BV / config.temperature
    if config.top_k is not None:
        smallest_B1 = jax.lax.top_k(logits_BV, config.top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV >= smallest_B1, logits_BV, -jnp.inf)
    if config.top_p < 1.0:
        sorted_BV = -jnp.sort(-logits_BV, axis=-1)
        probs_BV = jax.nn.softmax(sorted_BV, axis=-1)
        # A token stays while those before it have not reached top_p, so the first always does.
        top_p = max(config.top_p, 1e-30)  # Below that it is 0 in float32.
        kept_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV < top_p
        smallest_B1 = jnp.min(jnp.where(kept_BV, sorted_BV, jnp.inf), axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV >= smallest_B1, logits_BV, -jnp.inf)
    if config.min_p > 0.0:
        floor_B1 = jnp.max(logits_BV, axis=-1, keepdims=True) + jnp.log(config.min_p)
        logits_BV = jnp.where(logits_BV >= floor_B1, logits_BV, -jnp.inf)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)
