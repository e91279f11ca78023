"""Settings every test shares: one thread per operation, quiet libraries, no network, caches of the tests' own."""

import atexit
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["NO_COLOR"] = "1"
for name in ("FORCE_COLOR", "PY_COLORS", "CLICOLOR_FORCE", "GITHUB_ACTIONS", "COLUMNS", "TERM_PROGRAM"):
    os.environ.pop(name, None)  # rich and typer colour and wrap their output by these

# Models and tokens of whoever runs the tests must not decide whether a hub id is known. huggingface_hub reads this when imported.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="planner-tests-")
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

# torch's and diffusers' own deprecations are not this project's to fix.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"(diffusers|transformers|torch|accelerate)\b")

# The same examples in every run, however slow the machine; `pytest --hypothesis-profile=search` draws others.
settings.register_profile("planner", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("search", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.load_profile("planner")


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Traces and calibrations of one module's tests, empty at first: neither the user's nor what another module measured."""
    folder = tmp_path_factory.mktemp("planner-cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PLANNER_CACHE_DIR", str(folder))
        yield folder


@pytest.fixture(autouse=True)
def process_as_before() -> Iterator[None]:
    """A test leaves the process-wide switches, and the folder the process runs in, as it found them."""
    before = _switches()
    yield
    after = _switches()
    assert {name: after[name] for name in before} == before


FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    item.stash[FAILED] = item.stash.get(FAILED, False) or report.failed
    return report


@pytest.fixture(autouse=True)
def nothing_left_on_the_simulated_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test leaves the simulated device empty. (A failed one may not: its traceback holds what its frames held.)"""
    yield
    simulator = sys.modules.get("tests.sim")
    if simulator is not None and simulator.loaded():
        if not request.node.stash.get(FAILED, False):
            assert simulator.left_behind() == (0, 0), "bytes on the device and bytes pinned on the host"
        simulator.memory.forget()  # what diffusers keeps is not the next test's


def _switches() -> dict[str, Any]:
    found: dict[str, Any] = {"folder": os.getcwd()}
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "get_default_dtype"):
        cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
        found |= {
            "default dtype": torch.get_default_dtype(),
            "gradients": torch.is_grad_enabled(),
            "threads": torch.get_num_threads(),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "matmul precision": torch.get_float32_matmul_precision(),
            "cudnn.benchmark": cudnn.benchmark,
            "sdp": (cuda.flash_sdp_enabled(), cuda.math_sdp_enabled(), cuda.mem_efficient_sdp_enabled()),
        }
    dispatch = sys.modules.get("diffusers.models.attention_dispatch")
    if dispatch is not None:
        found["attention backend"] = dispatch._AttentionBackendRegistry.get_active_backend()[0]
    return found


@pytest.fixture
def sim() -> Iterator[Any]:
    """The simulated accelerator, active for one test: unlimited memory, counters at zero. See tests/sim/README.md."""
    from tests import sim as simulator

    with simulator.active():
        yield simulator
