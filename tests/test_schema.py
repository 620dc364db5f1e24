import dataclasses

import pytest

from craft_jax import schema
from craft_jax.schema import Contradiction, setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class Toy:
    low: int = setting(1, "a number", minimum=1, maximum=5)
    rate: float | None = setting(None, "a rate", above=0, below=1)
    free: int = setting(0, "a number without bounds of its own")

    def contradictions(self):
        if self.rate is not None and self.rate * self.low > 2:
            yield Contradiction(("toy.low", "toy.rate"), "too much")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, []),
        ({"low": 5, "rate": 0.1}, []),
        ({"low": 0}, ["toy.low=0 must be at least 1; the default is 1"]),
        ({"low": 6}, ["toy.low=6 must be at most 5; the default is 1"]),
        ({"rate": 0.0}, ["toy.rate=0.0 must be greater than 0; the default is None"]),
        ({"rate": 1.0}, ["toy.rate=1.0 must be less than 1; the default is None"]),
        ({"rate": float("inf")}, ["toy.rate=inf is not finite; the default is None"]),
        ({"low": 5, "rate": 0.9}, ["too much"]),
        ({"low": 9, "rate": 0.9}, ["toy.low=9 must be at most 5; the default is 1"]),
        ({"free": 2**31 - 1}, []),
        ({"free": 2**31}, ["toy.free=2147483648 must be at most 2147483647; the default is 0"]),
        (
            {"free": 10**5000},
            ["toy.free=(about 10**5000) must be at most 2147483647; the default is 0"],
        ),
        (
            {"free": 10**30},
            ["toy.free=10000000... (31 digits) must be at most 2147483647; the default is 0"],
        ),
    ],
)
def test_problems(values, expected):
    assert schema.problems(Toy(**values), "toy") == expected
