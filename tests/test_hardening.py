"""Files from others, full and read-only disks, two planners at once: a PlannerError or a plan, never a crash or a hang."""

from __future__ import annotations

import ast
import contextlib
import json
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import planner
from planner import Plan
from planner.calibrate.store import Store
from planner.dryrun import store
from planner.dryrun.trace import from_arrays
from planner.errors import ApplyError, PlannerError, ProfileError
from planner.explain.diff import compare_plans, render
from planner.hardware.profiles import find_gpu, load_gpu_file
from planner.models import resolve
from planner.resources import data_path
from tests.golden import cases

FUZZ = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)


def paths(value: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value."""
    yield here
    items: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from paths(inner, (*here, key))


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copied = dict(value) if isinstance(value, dict) else list(value)
    copied[path[0]] = replaced(value[path[0]], path[1:], new)
    return copied


@pytest.fixture(scope="module")
def plan_text() -> str:
    return cases.untouched().to_json()


@FUZZ
@given(st.text(max_size=300) | JSON.map(json.dumps))
def test_any_text_is_a_plan_or_an_error(text: str) -> None:
    with contextlib.suppress(PlannerError):
        Plan.from_json("{" + text)
    with contextlib.suppress(PlannerError):
        Plan.from_json(text if text.lstrip().startswith(("{", "[")) else f"[{text}]")


@FUZZ
@given(data=st.data())
def test_a_plan_with_one_place_replaced_is_a_plan_or_an_error(plan_text: str, data: st.DataObject) -> None:
    content = json.loads(plan_text)
    places = list(paths(content))
    path = places[data.draw(st.integers(0, len(places) - 1))]
    changed = replaced(content, path, data.draw(JSON))
    try:
        plan = Plan.from_json("  " + json.dumps(changed)) if isinstance(changed, dict | list) else None
    except PlannerError:
        return
    if plan is not None:
        assert Plan.from_json(plan.to_json()).to_json() == plan.to_json()
        show(plan)


def show(plan: Plan) -> None:
    """All that is made of a plan that came from a file."""
    other = cases.offloaded()
    for written in (plan.explain(verbose=True), plan._repr_html_(), render(compare_plans(plan, other)), render(compare_plans(other, plan))):
        assert written


ODD_NUMBERS = ("NaN", "Infinity", "1e999", "1e308", "1e-320", "-1e30", "9" * 400, str(1 << 63), "-1", "0", "0.0")


@pytest.mark.parametrize("number", ODD_NUMBERS)
@pytest.mark.parametrize("field", ["latency_seconds", "peak_allocated_bytes", "seconds", "budget_bytes", "speedup"])
def test_numbers_that_no_plan_has_are_refused_or_shown(field: str, number: str) -> None:
    """Found by fuzzing: NaN, numbers beyond a float, and times that add up to nothing got into tables and charts."""
    text, count = re.subn(rf'("{field}": )[-0-9.e+]+', rf"\g<1>{number}", cases.offloaded().to_json())
    assert count
    with contextlib.suppress(PlannerError):
        show(Plan.from_json(text))


def test_text_that_can_be_neither_shown_nor_saved_is_refused(plan_text: str, tmp_path: Path) -> None:
    """Found by fuzzing: half of a surrogate pair got through as a setting's value, and as the name of a component's library."""
    for field in ("model", "attention"):
        changed = re.sub(rf'("{field}": )"', r'\1"\\ud800', plan_text, count=1)
        assert changed != plan_text
        with pytest.raises(PlannerError, match="surrogates not allowed"):
            Plan.from_json(changed)
    (tmp_path / "model_index.json").write_text('{"_class_name": "DiTPipeline", "vae": ["\\ud800", "AutoencoderKL"]}')
    with pytest.raises(PlannerError, match="surrogates not allowed"):
        resolve(tmp_path)


def test_a_plan_of_a_model_in_an_unknown_users_home_is_shown_without_its_code() -> None:
    plan = Plan.from_json(cases.untouched().model_copy(update={"model": "~nobody-of-that-name/x", "statements": None}).to_json())
    with pytest.raises(ApplyError, match=r"planner\.explain"):
        plan.to_python()


@FUZZ
@given(data=st.data())
def test_a_damaged_plan_file_is_a_plan_or_an_error(plan_text: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    raw = bytearray(plan_text.encode())
    for _ in range(data.draw(st.integers(1, 5))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.json"
    path.write_bytes(raw[: data.draw(st.integers(0, len(raw)))])
    with contextlib.suppress(PlannerError):
        Plan.from_json(path)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"schema": ' * 50_000, '{"schema": "planner.plan/1", "workload": {"batch_size": 1e999}}',
             '{"schema": "planner.plan/1", "settings": {"../../etc": true}}', "{}", "null", ""],
    ids=["deep-list", "deep-object", "infinite", "path", "empty", "null", "nothing"])  # fmt: skip
def test_hostile_plans_are_refused(text: str) -> None:
    with pytest.raises(PlannerError):
        Plan.from_json(text)


def test_a_plan_file_is_never_larger_than_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "large.json"
    with path.open("wb") as file:
        file.truncate(1 << 34)  # sparse
    with pytest.raises(PlannerError, match="larger than any plan file"):
        Plan.from_json(path)
    with pytest.raises(PlannerError):
        Plan.from_json(tmp_path)
    with pytest.raises(PlannerError):
        Plan.from_json(tmp_path / "absent.json")


@FUZZ
@given(data=st.data())
def test_a_damaged_trace_is_ignored(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    from planner.dryrun.trace import to_arrays
    from tests.test_trace_cache import example

    folder = tmp_path_factory.getbasetemp() / "fuzzed"
    before = os.environ.get("PLANNER_CACHE_DIR")
    os.environ["PLANNER_CACHE_DIR"] = str(folder)
    logging.disable(logging.WARNING)
    try:
        store.save("k", *to_arrays(example()))
        path = next((folder / "traces").glob("*k*"))
        raw = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 8))):
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
        path.write_bytes(raw[: data.draw(st.integers(0, len(raw)))])
        store.load("k", from_arrays)
    finally:
        logging.disable(logging.NOTSET)
        if before is None:
            del os.environ["PLANNER_CACHE_DIR"]
        else:
            os.environ["PLANNER_CACHE_DIR"] = before


@pytest.mark.parametrize(("old", "new"), [
    ("[", "[" * 4000), ("12288", "9" * 5000), ("12288", "9" * 400), ("360.0", "inf"), ("360.0", "nan"),
], ids=["deep", "digits", "large", "infinite", "nan"])  # fmt: skip
def test_hostile_gpu_files_are_refused(tmp_path: Path, old: str, new: str) -> None:
    """Found by fuzzing: endless brackets, and numbers of more digits than Python reads."""
    text = (data_path("profiles", "gpus") / "ampere.toml").read_text()
    assert old in text
    file = tmp_path / "gpu.toml"
    file.write_text(text.replace(old, new, 1))
    with pytest.raises(ProfileError, match=r"gpu\.toml"):
        load_gpu_file(file)


@FUZZ
@given(st.text(max_size=60))
def test_any_name_is_a_gpu_or_an_error(name: str) -> None:
    with contextlib.suppress(PlannerError):
        find_gpu(name)


# -- nothing that is read is run ---------------------------------------------------------------------------------------

UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml"}


def test_no_code_here_unpickles_or_runs_text() -> None:
    sources = sorted(Path(planner.__file__).parent.rglob("*.py"))
    assert len(sources) > 100
    found = [f"{path.name}:{node.lineno}" for path in sources for node in ast.walk(ast.parse(path.read_text())) if runs_what_it_reads(node)]
    assert found == []


def runs_what_it_reads(node: Any) -> bool:
    if isinstance(node, ast.Import | ast.ImportFrom):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        return bool({name.partition(".")[0] for name in names} & UNPICKLERS)
    if not isinstance(node, ast.Call):
        return False
    refused = {"allow_pickle": True, "trust_remote_code": True, "weights_only": False}
    if any(word.arg in refused and not (isinstance(word.value, ast.Constant) and word.value.value is not refused[word.arg])
           for word in node.keywords):  # fmt: skip
        return True
    return ast.unparse(node.func) in ("eval", "exec", "compile", "torch.load", "torch.jit.load", "torch.hub.load")


@pytest.mark.parametrize(("text", "expected"), [
    ("import pickle", True), ("from torch import nn", False), ("torch.load(path)", True), ("model.eval()", False), ("exec(text)", True),
    ("np.load(f, allow_pickle=x)", True), ("np.load(f, allow_pickle=False)", False),
])  # fmt: skip
def test_the_check_finds_what_it_looks_for(text: str, expected: bool) -> None:
    assert any(map(runs_what_it_reads, ast.walk(ast.parse(text)))) is expected


@pytest.mark.slow
def test_nothing_is_unpickled_while_files_are_read(tmp_path: Path) -> None:
    """Python's own audit event of the unpickler, while a folder, a cached trace, a plan and calibrations are read."""
    watched = (
        "import sys, runpy\n"
        "def watch(event, args):\n    if event == 'pickle.find_class': print('unpickled', args, file=sys.stderr)\n"
        "sys.addaudithook(watch); sys.argv = sys.argv[1:]; runpy.run_module('planner', run_name='__main__')"
    )  # fmt: skip
    folder = Path(planner.__file__).parents[1] / "profiles/models/stable-diffusion-v1-5"
    variables = {**os.environ, "PLANNER_CACHE_DIR": str(tmp_path)}
    (tmp_path / "plan.json").write_text(cases.untouched().to_json())
    asked = (["explain", str(folder), "--gpu", "RTX 3060", "--json"], ["explain", str(folder), "--gpu", "RTX 3060", "--json"],
             ["diff", str(tmp_path / "plan.json"), str(tmp_path / "plan.json")])  # fmt: skip
    for arguments in asked:
        done = subprocess.run([sys.executable, "-c", watched, "planner", *arguments], env=variables, capture_output=True, text=True,
                              timeout=300, check=False)  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "unpickled" not in done.stderr


# -- the cache directory ----------------------------------------------------------------------------------------------

EXPLAIN = [sys.executable, "-m", "planner", "explain", "stable-diffusion-v1-5", "--gpu", "RTX 3060", "--json"]


def explain(cache: Path, **environment: str) -> subprocess.Popen[str]:
    variables = {**os.environ, "PLANNER_CACHE_DIR": str(cache), **environment}
    return subprocess.Popen(EXPLAIN, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_two_processes_planning_at_once_agree_and_leave_a_cache_that_works(tmp_path: Path) -> None:
    both = [explain(tmp_path) for _ in range(2)]
    answers = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], answers
    assert answers[0][0] == answers[1][0]
    again = explain(tmp_path)
    output, errors = again.communicate(timeout=300)
    assert output == answers[0][0], errors
    assert not list(tmp_path.rglob("*.tmp"))
    assert not list(tmp_path.rglob("*.bad"))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are POSIX")
def test_progress_is_shown_on_a_terminal_and_nowhere_else(tmp_path: Path) -> None:
    import pty

    reader, terminal = pty.openpty()
    variables = {**os.environ, "PLANNER_CACHE_DIR": str(tmp_path), "TERM": "xterm"}
    try:
        watched = subprocess.run(EXPLAIN, env=variables, stdout=subprocess.PIPE, stderr=terminal, timeout=300, check=True)
        os.set_blocking(reader, False)
        assert b"planning stable-diffusion-v1-5" in os.read(reader, 1 << 16)
    finally:
        os.close(terminal)
        os.close(reader)
    piped = subprocess.run(EXPLAIN, env=variables, capture_output=True, timeout=300, check=True)
    assert piped.stderr == b""
    assert piped.stdout == watched.stdout


@pytest.mark.slow
def test_a_cache_directory_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    """A file stands where the directory should be: it binds root, too."""
    blocked = tmp_path / "cache"
    blocked.write_text("in the way")
    process = explain(blocked)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert json.loads(output)["settings"]
    assert blocked.read_text() == "in the way"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full to be a full disk")
def test_output_to_a_full_disk_ends_without_a_traceback(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        variables = {**os.environ, "PLANNER_CACHE_DIR": str(tmp_path)}
        process = subprocess.run(EXPLAIN, env=variables, stdout=full, stderr=subprocess.PIPE, text=True, timeout=300, check=False)
    assert process.returncode != 0
    assert "Traceback" not in process.stderr


@pytest.mark.slow
def test_a_disk_that_fills_up_while_traces_are_written_costs_only_the_cache(tmp_path: Path) -> None:
    """A limit on file sizes is what a process sees of a full disk: writing stops in the middle of a file."""
    few_bytes = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)); sys.argv = sys.argv[1:]; "
    command = [sys.executable, "-c", few_bytes + "runpy.run_module('planner', run_name='__main__')", "planner", *EXPLAIN[3:]]
    variables = {**os.environ, "PLANNER_CACHE_DIR": str(tmp_path)}
    full = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300, check=False)
    assert full.returncode == 0, full.stderr
    assert [(p.name, p.stat().st_size) for p in tmp_path.rglob("*") if p.is_file() and p.stat().st_size >= 4096] == []
    assert not list(tmp_path.rglob("*.tmp"))
    output, errors = explain(tmp_path).communicate(timeout=300)
    assert output == full.stdout, errors


@pytest.mark.slow
def test_a_process_killed_while_planning_leaves_a_cache_that_works(tmp_path: Path) -> None:
    killed = explain(tmp_path)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("traces/*")) and time.monotonic() < deadline:  # the first file, whole or half
        time.sleep(0.002)
    killed.kill()
    killed.communicate(timeout=60)
    assert list(tmp_path.glob("traces/*")), "killed before it wrote anything"
    left = tmp_path / "traces" / ".left.0123456789ab.tmp"
    left.write_bytes(b"half")
    os.utime(left, (0, 0))
    again = explain(tmp_path)
    output, errors = again.communicate(timeout=300)
    assert again.returncode == 0, errors
    assert json.loads(output)["settings"]
    assert "is not used" not in errors, "no file is half there"
    assert not left.exists(), "what was left half written long ago is gone"


@pytest.mark.slow
def test_two_processes_calibrating_while_one_plans_lose_nothing(tmp_path: Path) -> None:
    variables = {**os.environ, "PLANNER_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "planner", "calibrate", "--quick", "--device", "cpu", "--json"]
    both = [subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    planning = explain(tmp_path)
    for process in (*both, planning):
        _, errors = process.communicate(timeout=500)
        assert process.returncode == 0, errors
    (stored,) = Store(tmp_path / "calibration").show()
    assert len(stored.runs) == 2
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".tmp", ".bad")]


@pytest.mark.slow
def test_every_process_finds_the_same_bytes_for_itself(tmp_path: Path) -> None:
    """Caches of their own, so that each makes its own dry run; sets and dictionaries in other orders."""
    found = [explain(tmp_path / seed, PYTHONHASHSEED=seed).communicate(timeout=300) for seed in ("1", "2", "3")]
    assert len({output for output, _ in found}) == 1, found
    assert found[0][0]
