"""The project's tests; a package so that `tests.zoo` and `tests.sim` can be imported from anywhere."""
