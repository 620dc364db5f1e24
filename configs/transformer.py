"""A language model of PyTorch's own transformer layers, as the original Craft had it.

    python -m craft_jax.main --config=configs/transformer.py             # tiny
    python -m craft_jax.main --config=configs/transformer.py:124m

Its blocks are `torch.nn.TransformerEncoderLayer`, and it leaves for PyTorch as a state dict of
plain `torch.nn` parts (`python -m interop export RUN model.pt --to torch-encoder`). It trains on
the source of Python's own standard library, or with `--config.data.path=...` on your text. Presets,
with what to expect:

    preset  parameters  where                  time           loss (nats per token)
    tiny    0.9 M       2 CPU cores            2 to 3 min     2.9 (1.9 bits per byte)
    small   11 M        a GPU, or a night      unmeasured     unmeasured
    124m    124 M       GPUs or TPUs           unmeasured     unmeasured
    350m    355 M       "                      unmeasured     unmeasured
    774m    774 M       "                      unmeasured     unmeasured
    1558m   1,558 M     "                      unmeasured     unmeasured

Sizes are those of `configs/gpt.py`. What differs from a GPT: embedded tokens are multiplied by
sqrt(d_model), and dropout, where there is any, also zeroes hidden units of the MLP. For others of
the models that Craft had, `--config.model.cross_attention=zeros` or `empty`,
`--config.model.norm_first=false`, `--config.model.positions=sinusoidal`.
"""

from ml_collections import ConfigDict

# Layers, heads and width of the GPT-2 family (Radford et al. 2019, table 2), and the learning rate
# that GPT-3 used at that size (Brown et al. 2020, table 2.1).
_GPT2 = {
    "124m": (12, 12, 768, 6e-4),
    "350m": (24, 16, 1024, 3e-4),
    "774m": (36, 20, 1280, 2.5e-4),
    "1558m": (48, 25, 1600, 2e-4),
}
_PRESETS = ("tiny", "small", *_GPT2)


def get_config(preset: str = "tiny") -> ConfigDict:
    if preset not in _PRESETS:
        raise ValueError(f"preset {preset!r} is not one of {', '.join(_PRESETS)}")
    config = ConfigDict()
    config.model = ConfigDict({"name": "transformer", "norm_first": True, "embedding_scale": True})
    config.data = ConfigDict({"source": "auto", "tokenizer": "bpe", "val_fraction": 0.02})
    config.optim = ConfigDict({"name": "adamw", "schedule": "cosine"})
    config.training = ConfigDict({"precision": "float32", "seed": 0})
    config.parallel = ConfigDict({"mode": "jit", "data": -1, "fsdp": 1, "tensor": 1})
    if preset == "tiny":
        _tiny(config)
    elif preset == "small":
        _small(config)
    else:
        _gpt2(config, *_GPT2[preset])
    return config


def _tiny(config: ConfigDict) -> None:
    config.model.update(num_layers=4, num_heads=4, d_model=128, max_seq_len=128, dropout=0.0)
    # The last 100 kB of a tenth are enough to validate on, and quick.
    config.data.update(vocab_size=1024, seq_len=128, batch_size=16, max_val_tokens=30_000)
    config.optim.update(learning_rate=4e-3, min_learning_rate=4e-4, beta2=0.99)
    config.training.update(
        num_steps=600, eval_every=200, checkpoint_every=200, sample_every=200, log_every=20
    )


def _small(config: ConfigDict) -> None:
    config.model.update(num_layers=6, num_heads=6, d_model=384, max_seq_len=256, dropout=0.1)
    config.data.update(vocab_size=1024, seq_len=256, batch_size=64, max_val_tokens=300_000)
    config.optim.update(learning_rate=1e-3, min_learning_rate=1e-4, beta2=0.99)
    config.training.update(
        num_steps=5000, eval_every=250, checkpoint_every=500, sample_every=500, log_every=10
    )


def _gpt2(
    config: ConfigDict, num_layers: int, num_heads: int, d_model: int, learning_rate: float
) -> None:
    config.model.update(num_layers=num_layers, num_heads=num_heads, d_model=d_model)
    config.model.update(max_seq_len=1024, dropout=0.0, vocab_size=50257)
    config.data.update(vocab_size=50257, seq_len=1024, batch_size=480, max_val_tokens=3_000_000)
    config.optim.update(learning_rate=learning_rate, min_learning_rate=learning_rate / 10)
    config.optim.update(beta2=0.95, warmup_steps=2000, decay_steps=600_000)
    config.training.update(precision="bfloat16", remat=True, accumulate=40, num_steps=600_000)
    config.training.update(eval_every=1000, checkpoint_every=1000, sample_every=1000, log_every=10)
