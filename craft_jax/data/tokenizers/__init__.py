"""Text to token ids and back."""

from craft_jax.data.tokenizers.tokenizer import (
    END_TOKEN,
    KINDS,
    TextStream,
    Tokenizer,
    bytes_,
    characters,
    numbered_characters,
    open_fixed,
    train_bpe,
)

__all__ = [
    "END_TOKEN",
    "KINDS",
    "TextStream",
    "Tokenizer",
    "bytes_",
    "characters",
    "numbered_characters",
    "open_fixed",
    "train_bpe",
]
