"""Every family of the zoo runs for real on the CPU, gives finite output that is not constant, and is reproducible."""

import numpy as np
import pytest

from tests.zoo import FAMILIES

NAMES = [pytest.param(name, marks=[pytest.mark.slow] if case.slow else []) for name, case in FAMILIES.items()]


@pytest.mark.parametrize("name", NAMES)
def test_family_runs_and_gives_finite_output(name: str) -> None:
    case = FAMILIES[name]
    output = case.run(case.build())
    assert output.size > 1
    assert np.isfinite(output).all()
    assert output.std() > 0, "a constant output would hide every error"


def test_same_seed_same_output_from_two_builds() -> None:
    case = FAMILIES["sd15"]
    first, second, other = case.run(case.build()), case.run(case.build()), case.run(case.build(), seed=1)
    assert np.array_equal(first, second)
    assert not np.array_equal(first, other)
