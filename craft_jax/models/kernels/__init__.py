"""The operations that have a fast form for a backend, one name each.

Only this package asks for the backend, when an operation is traced. Shape letters as in `layers`.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from craft_jax.models.attention import check_heads, reference_attention
from craft_jax.models.kernels import cpu, gpu
from craft_jax.models.numerics import accum_dtype, dropout_mask, promoted

Array = jax.Array

MAX_TRANSPOSED_BYTES = 4 << 30

_TILE = (
    128  # Table rows are padded to a multiple of it: other widths keep a GPU from fast products.
)


def backend() -> str:
    """Returns the platform of the default device: cpu, gpu or tpu."""
    return jax.default_backend()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeKernel:
    """A dense kernel beside its transpose; it replaces the kernel in the parameters of decoding.

    Attributes:
      kernel_DF: the parameter; `[...]`, `dtype` and `shape` are those of it.
      kernel_FD: its transpose, in at least float32.
    """

    kernel_DF: Array
    kernel_FD: Array

    def __getitem__(self, index: object) -> Array:
        return self.kernel_DF[index]

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the parameter."""
        return self.kernel_DF.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the parameter."""
        return self.kernel_DF.shape


def transpose_kernels(kernels: Mapping[str, Array], num_rows: int) -> dict[str, DecodeKernel]:
    """Returns the dense kernels with their transposes, by path, where that speeds up decoding.

    It does where XLA:CPU multiplies a single vector: a product with (F, D) is one pass over memory
    in all cores, at 26 GB/s where reading takes 30; with (D, F) it is 20. The transposes are in at
    least float32, since XLA:CPU has no such product of bfloat16. They take as much memory again, so
    kernels above `MAX_TRANSPOSED_BYTES` have none.
    """
    num_bytes = sum(4 * kernel_DF.size for kernel_DF in kernels.values())
    if num_rows > 1 or backend() != "cpu" or num_bytes > MAX_TRANSPOSED_BYTES:
        return {}
    transposed = _transpose(dict(kernels))
    return {
        path: DecodeKernel(kernel_DF=kernel_DF, kernel_FD=transposed[path])
        for path, kernel_DF in kernels.items()
    }


@jax.jit
def _transpose(kernels: dict[str, Array]) -> dict[str, Array]:
    return {path: k_DF.T.astype(accum_dtype(k_DF.dtype)) for path, k_DF in kernels.items()}


def matmul(x_MD: Array, kernel: Array | DecodeKernel) -> Array:
    """Returns `x @ kernel`, (M, F), in the dtype to which they promote."""
    dtype = promoted(x_MD.dtype, kernel.dtype)
    if isinstance(kernel, DecodeKernel):
        x_MD = x_MD.astype(dtype).astype(kernel.kernel_FD.dtype)
        return jnp.einsum("md,fd->mf", x_MD, kernel.kernel_FD).astype(dtype)
    x_MD, kernel_DF = x_MD.astype(dtype), kernel.astype(dtype)
    if dtype == jnp.bfloat16 and backend() == "cpu":
        return cpu.bfloat16_product(x_MD, kernel_DF)
    return x_MD @ kernel_DF


def pad_table(table_VD: Array, num_rows: int) -> Array:
    """Appends rows of zeros to a table, to a multiple of a tile, where a product gains by it.

    On the CPU and for the few rows of decoding, padding costs more than it gains.
    """
    if backend() == "cpu" or num_rows < _TILE:
        return table_VD
    return jnp.pad(table_VD, ((0, -table_VD.shape[0] % _TILE), (0, 0)))


def causal_attention(
    q_BTHK: Array,
    k_BTNK: Array,
    v_BTNK: Array,
    *,
    segments_BT: Array | None = None,
    dropout_rate: float = 0.0,
    key: Array | None = None,
) -> Array:
    """Causal multi-head attention (arXiv:1706.03762); grouped-query if N < H (arXiv:2305.13245).

    Query t attends to keys s <= t; with `segments_BT` (packed documents) to those of its own
    segment only. Products are in the dtype of the operands, scores and softmax in at least float32,
    and the scale is 1/sqrt(K). Where keys come from a cache, see `cached_attention`.

    Args:
        q_BTHK: queries.
        k_BTNK: keys, in the dtype of the queries; head h reads key head h // (H / N).
        v_BTNK: values, likewise.
        segments_BT: int32, the segment of each token; or None.
        dropout_rate: rate of dropout on the probabilities, in [0, 1).
        key: randomness for it; None: no dropout.

    Returns:
        y_BTHK in the dtype of q.

    Raises:
        ValueError: N does not divide H, the numbers of queries and keys differ, or a rate outside
            [0, 1).
    """
    (B, T, H, _), (S, N) = q_BTHK.shape, k_BTNK.shape[1:3]
    check_heads(H, N)
    if T != S:
        raise ValueError(f"{T} queries but {S} keys; use cached_attention for keys of a cache")
    if backend() == "cpu":
        keep_BHTT = dropout_mask((B, H, T, T), dropout_rate, key)
        return cpu.blocked_attention(q_BTHK, k_BTNK, v_BTNK, keep_BHTT, segments_BT, dropout_rate)
    # float32 uses the reference: the library function may multiply with less precision.
    is_half = q_BTHK.dtype in (jnp.bfloat16, jnp.float16)
    if is_half and (key is None or dropout_rate == 0.0):
        return gpu.fused_attention(q_BTHK, k_BTNK, v_BTNK, segments_BT, backend())
    options = {"segments_BT": segments_BT, "dropout_rate": dropout_rate, "key": key}
    return reference_attention(q_BTHK, k_BTNK, v_BTNK, **options)
