"""Settings every test shares: one thread per operation, quiet libraries, no network."""

import os
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_NUM_THREADS", "1")

# torch's and diffusers' own deprecations are not this project's to fix.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"(diffusers|transformers|torch|accelerate)\b")


@pytest.fixture
def sim() -> Iterator[Any]:
    """The simulated accelerator, active for one test: unlimited memory, counters at zero. See tests/sim/README.md."""
    from tests import sim as simulator

    with simulator.active():
        yield simulator
