"""Tensors of torch and arrays of numpy, bit for bit, bfloat16 and float8 included. Needs torch."""

import ml_dtypes
import numpy as np
import torch

# numpy cannot name these dtypes to torch, nor torch to numpy: the bits go through integers.
_THROUGH = {
    np.dtype(ml_dtypes.bfloat16): (torch.bfloat16, np.int16, torch.int16),
    np.dtype(ml_dtypes.float8_e4m3fn): (torch.float8_e4m3fn, np.int8, torch.int8),
    np.dtype(ml_dtypes.float8_e5m2): (torch.float8_e5m2, np.int8, torch.int8),
}
_BACK = {theirs: (ours, through) for ours, (theirs, _, through) in _THROUGH.items()}


def to_torch(array: np.ndarray) -> torch.Tensor:
    """Returns a tensor with the same bits, in memory of its own."""
    copy = np.array(array, order="C")
    if copy.dtype in _THROUGH:
        theirs, through, _ = _THROUGH[copy.dtype]
        return torch.from_numpy(copy.view(through)).view(theirs)
    return torch.from_numpy(copy)


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """Returns an array with the same bits; it shares memory with a tensor that is on the CPU."""
    plain = tensor.detach().cpu()
    if plain.dtype in _BACK:
        ours, through = _BACK[plain.dtype]
        return plain.contiguous().view(through).numpy().view(ours)
    return plain.numpy()
