"""A GPT of images: pixel after pixel, each one of a palette's colours (Chen et al. 2020).

    python -m craft_jax.main --config=configs/image_gpt.py             # digits
    python -m craft_jax.main generate --run=latest --label=3 --num_samples=16
    python -m craft_jax.main generate --run=latest --image=val         # completes upper halves

It trains on scikit-learn's digits, which need no download, in about three minutes on two CPU cores,
0.6 M parameters, and ends at about 1.16 nats per pixel, 1.67 bits per dimension (a histogram of
each pixel has 2.43). An image begins with a token for its class, then come its pixels, row after
row, in the 17 levels of gray that digits have. For photographs: docs/generative.md.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.model = ConfigDict({"name": "gpt", "num_layers": 3, "num_heads": 4, "d_model": 128})
    config.model.update(max_seq_len=64, dropout=0.15)
    config.data = ConfigDict({"source": "digits", "image_channels": 1, "image_colors": 17})
    config.data.update(batch_size=32, val_fraction=0.1, tokenizer=None)
    config.optim = ConfigDict({"name": "muon", "schedule": "cosine", "ema_decay": 0.995})
    config.optim.update(learning_rate=4e-3, min_learning_rate=1e-4, weight_decay=0.3)
    config.training = ConfigDict({"precision": "float32", "seed": 0})
    config.training.update(
        num_steps=1200, eval_every=200, checkpoint_every=400, sample_every=200, log_every=50
    )
    return config
