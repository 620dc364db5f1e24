"""Sources of documents: files, Parquet, Hugging Face, TFDS, and classes of the user's own."""

from craft_jax.data.sources.files import open_files

__all__ = ["open_files"]
