import ml_dtypes
import numpy as np
import pytest

from craft_jax.errors import UsageError
from interop.errors import DtypeError
from interop.mapping import dtypes
from interop.mapping.tensors import lazy


def test_too_large_for_float16_is_refused_and_infinity_stays():
    tensors = {"w": lazy(np.array([1.0, 7e4, np.inf], np.float32))}
    with pytest.raises(DtypeError, match="w: 1 values are too large for float16"):
        dtypes.as_dtype(tensors, dtypes.named("fp16"))["w"].read()
    kept = dtypes.as_dtype({"w": lazy(np.array([1, np.inf], np.float32))}, dtypes.named("fp16"))
    assert kept["w"].read().tolist() == [1, np.inf]


def test_rounding_is_to_nearest_even():
    values = np.array([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-12], np.float32)
    found = dtypes.as_dtype({"w": lazy(values)}, dtypes.named("bf16"))["w"].read()
    assert found.astype(np.float32).tolist() == [1, 1 + 2**-6, 1 + 2**-7]


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
def test_odd_values_are_counted_as_numpy_counts_them(dtype, rng):
    width = np.dtype(dtype).itemsize
    array = rng.integers(0, 256, (3000, width), np.uint8).view(dtype)[:, 0]
    array[:7] = [np.nan, np.inf, -np.inf, 0, -0.0, 1, -1]
    with np.errstate(invalid="ignore"):
        finite = np.isfinite(array.astype(np.float64))
    assert dtypes.count_nonfinite(array) == np.count_nonzero(~finite) >= 3
    assert dtypes.count_nonfinite(array.reshape(100, 30).T) == np.count_nonzero(~finite)


def test_dtypes_that_no_model_has():
    with pytest.raises(DtypeError, match="dtype=fp32"):
        dtypes.check_dtypes({"w": lazy(np.ones(1))}, None)
    dtypes.check_dtypes({"w": lazy(np.ones(1))}, dtypes.named("fp64"))
    with pytest.raises(DtypeError, match="w is int8"):
        dtypes.check_dtypes({"w": lazy(np.ones(1, np.int8))}, dtypes.named("fp32"))
    with pytest.raises(UsageError, match="dtype=int4"):
        dtypes.named("int4")


def test_the_digest_is_of_the_values_in_order(rng):
    array = rng.standard_normal((4, 6)).astype(np.float32)
    assert dtypes.digest(array.T) == dtypes.digest(np.ascontiguousarray(array.T))
    assert dtypes.digest(array.T) != dtypes.digest(array)
    assert dtypes.digest(np.float32(1.0).reshape(())) == dtypes.digest(np.ones(1, np.float32))
