import ml_dtypes
import numpy as np
import pytest

from interop.errors import DtypeError, ShapeMismatchError, TiedWeightsError
from interop.mapping.ops import Chain, Concat, Tie, Transpose, Zeros
from interop.mapping.tensors import Abstract, same_bits

SHAPES = {
    "rename": ((), [(3, 5)]),
    "transpose": ((Transpose(),), [(3, 5)]),
    "a square": ((Transpose(),), [(4, 4)]),
    "columns": ((Concat(1),), [(3, 2), (3, 5), (3, 1)]),
    "rows": ((Concat(0),), [(2,), (2,), (2,)]),
    "columns, turned": ((Concat(1), Transpose()), [(3, 4), (3, 4), (3, 4)]),
    "tied": ((Tie(),), [(3, 2)]),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_every_bit_comes_back(name, dtype, rng):
    ops, shapes = SHAPES[name]
    bytes_ = np.dtype(dtype).itemsize
    # Any bit pattern at all, NaN payloads among them.
    arrays = tuple(
        rng.integers(0, 256, (*shape, bytes_), np.uint8).view(dtype)[..., 0] for shape in shapes
    )
    chain = Chain(ops)
    assert chain.exact
    abstract = tuple(Abstract(a.shape, a.dtype) for a in arrays)
    made = chain.forward(arrays)
    assert [Abstract(m.shape, m.dtype) for m in made] == list(chain.shapes(abstract))
    again = chain.inverse(made, abstract)
    assert all(same_bits(a, b) for a, b in zip(arrays, again, strict=True))


def test_square_matrices_are_transposed_too(rng):
    array = rng.standard_normal((4, 4))
    (made,) = Transpose().forward((array,))
    assert np.array_equal(made, array.T) and not np.array_equal(made, array)


def test_tied_tensors_that_differ_are_named_with_the_difference():
    a = np.zeros((2, 2), np.float32)
    b = a.copy()
    b[1, 1] = 0.25
    with pytest.raises(TiedWeightsError, match=r"up to 0\.25"):
        Tie().inverse((a, b), ())
    with pytest.raises(TiedWeightsError, match="float16"):
        Tie().inverse((a, a.astype(np.float16)), ())


def test_minus_zero_is_not_zero_when_tensors_are_tied():
    a = np.zeros(2, np.float32)
    with pytest.raises(TiedWeightsError):
        Tie().inverse((a, -a), ())


def test_zeros_have_the_dtype_of_their_neighbour_and_refuse_values():
    like = np.ones(3, ml_dtypes.bfloat16)
    (made,) = Zeros((5,)).forward((like,))
    assert made.dtype == like.dtype and made.shape == (5,) and not made.any()
    assert Zeros((5,)).inverse((made,), ()) == ()
    made[3] = 1
    with pytest.raises(ShapeMismatchError, match="1 values are not zero"):
        Zeros((5,)).inverse((made,), ())


def test_arrays_that_cannot_be_joined():
    f32, f16 = np.dtype(np.float32), np.dtype(np.float16)
    with pytest.raises(DtypeError, match="float32, float16"):
        Concat(0).shapes((Abstract((2,), f32), Abstract((2,), f16)))
    with pytest.raises(ShapeMismatchError, match=r"\(2, 3\), \(3, 3\)"):
        Concat(1).shapes((Abstract((2, 3), f32), Abstract((3, 3), f32)))
    with pytest.raises(ShapeMismatchError, match="cannot transpose"):
        Transpose().shapes((Abstract((2,), f32),))
