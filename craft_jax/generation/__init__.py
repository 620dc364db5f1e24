"""Text and images from trained models."""

from craft_jax.generation.sampling import SamplingConfig

__all__ = ["SamplingConfig"]
