"""Traces on disk: the same after a round trip, found without torch, and no file is trusted."""

import json
import logging
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from planner.dryrun import store
from planner.dryrun.provider import Traces
from planner.dryrun.trace import CallTrace, Event, PipelineTrace, VaeMode, columns_from_rows, from_arrays, to_arrays
from planner.models import resolve
from planner.types import Workload
from tests.zoo import FAMILIES

ROWS = [
    (0, 1, 8.0, 100, 50, 60, 512, 512, 40, 50, 512, 1, 1, 0, 1, 2, 3, 4, 0, 0, 0, 0),
    (4, 1, 0.0, 50, 50, 0, 1024, 512, 0, 0, 512, 0, 0, 1, *[0] * 8),
]


def call(name: str, rows: list[tuple[float, ...]], fallbacks: tuple[str, ...] = ()) -> CallTrace:
    spans = np.array([[0, 2, 512], [1, 2, 512]], dtype=np.int64)
    return CallTrace(name, "forward", columns_from_rows(rows), ("", "proj"), ("mm", "add"), 512, 64, fallbacks, spans)


def example() -> PipelineTrace:
    tail = Event(-1, 5, 4, 3, 2, 0)
    return PipelineTrace(
        (call("unet", ROWS, ("unique: no meta kernel",)), call("vae", ROWS[:1])),
        (Event(0, 1, 2, 3, 4, 5), Event(0, 1, 0, 0, 4, 5), Event(1, 9, 8, 7, 6, 5)),
        tail, 2, 77, 3, "fp16", {(1, "slice+tile=64"): call("vae", [])}, ("a note",), (3, 8), {(1, "tile"): "ValueError: no"},
        frozenset({"tile", "slice+tile=64"}))  # fmt: skip


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PLANNER_CACHE_DIR", str(tmp_path))
    return tmp_path / "traces"


def same(left: PipelineTrace, right: PipelineTrace) -> bool:
    """Whether two traces are written the same."""
    (head, arrays), (other_head, other) = to_arrays(left), to_arrays(right)
    return json.dumps(head) == json.dumps(other_head) and all(np.array_equal(arrays[name], other[name]) for name in arrays)


def test_a_trace_survives_the_disk(cache: Path) -> None:
    trace = example()
    store.save("k", *to_arrays(trace))
    again = store.load("k", from_arrays)
    assert again is not None
    assert same(again, trace)
    assert again.events == trace.events
    assert again.tail == trace.tail
    assert again.calls[0].dims[0].tolist() == [1, 2, 3, 4, 0, 0, 0, 0]
    assert again.variants[1, "slice+tile=64"].spans.tolist() == [[0, 2, 512], [1, 2, 512]]
    assert again.refused == {(1, "tile"): "ValueError: no"}
    assert [path.name for path in cache.iterdir()] == ["k.npz"], "no temporary file stays behind"


def _rewrite(path: Path, change: object) -> None:
    with np.load(path, allow_pickle=False) as stored:
        arrays = dict(stored)
    change(arrays)
    np.savez_compressed(path, **arrays)


def _header(**changes: object):
    def change(arrays: dict[str, np.ndarray]) -> None:
        header = json.loads(arrays["header"].tobytes()) | changes
        arrays["header"] = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)

    return change


def _module_out_of_range(arrays: dict[str, np.ndarray]) -> None:
    arrays["integers"] = arrays["integers"] + 1000


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"PK\x03\x04 no archive"),
        lambda path: path.write_bytes(path.read_bytes()[:-200]),
        lambda path: np.savez(path, evil=np.zeros(3)),
        lambda path: np.savez(path, header=np.array([{"a": 1}], dtype=object)),
        lambda path: _rewrite(path, _header(schema="planner.trace/0")),
        lambda path: _rewrite(path, _header(key="another")),
        lambda path: _rewrite(path, _header(extra=1)),
        lambda path: _rewrite(path, _header(steps="many")),
        lambda path: _rewrite(path, lambda arrays: arrays.update(flops=arrays["flops"][:-1])),
        lambda path: _rewrite(path, lambda arrays: arrays.update(flops=arrays["flops"].astype(np.float32))),
        lambda path: _rewrite(path, lambda arrays: arrays.pop("events")),
        lambda path: _rewrite(path, _module_out_of_range),
        lambda path: path.open("ab").truncate(store.MAX_FILE_BYTES + 1),
    ],
)  # fmt: skip
def test_a_spoiled_file_is_reported_ignored_and_replaced(cache: Path, caplog: pytest.LogCaptureFixture, spoil: object) -> None:
    store.save("k", *to_arrays(example()))
    spoil(cache / "k.npz")
    with caplog.at_level(logging.WARNING):
        assert store.load("k", from_arrays) is None
    assert "not used" in caplog.text
    store.save("k", *to_arrays(example()))
    assert store.load("k", from_arrays) is not None


def test_arrays_that_would_unpack_to_more_than_the_limit_are_not_unpacked(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.save("k", *to_arrays(example()))
    with zipfile.ZipFile(cache / "k.npz") as archive:
        unpacked = sum(member.file_size for member in archive.infolist())
    monkeypatch.setattr(store, "MAX_ARRAY_BYTES", unpacked - 1)
    assert store.load("k", from_arrays) is None


def test_a_directory_that_cannot_be_written_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("PLANNER_CACHE_DIR", str(tmp_path / "file"))
    store.save("k", *to_arrays(example()))
    assert "not kept" in caplog.text
    assert store.load("k", from_arrays) is None


def test_the_oldest_entries_go_when_there_are_too_many(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "MAX_FILES", 2)
    for age, key in enumerate(("new", "older", "oldest")):
        store.save(key, *to_arrays(example()))
        os.utime(cache / f"{key}.npz", (1e9 - age, 1e9 - age))
    store.save("newest", *to_arrays(example()))
    assert {path.stem for path in cache.iterdir()} == {"newest", "new"}


def test_a_key_depends_on_content_and_library_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    before = store.entry_key({"model": "a", "dtype": None})
    assert before == store.entry_key({"dtype": None, "model": "a"})
    assert before != store.entry_key({"model": "a", "dtype": "fp16"})
    monkeypatch.setattr(store, "versions", lambda: (("torch", "0.0"),))
    assert before != store.entry_key({"model": "a", "dtype": None})


@pytest.mark.parametrize("text", ["", "slice", "tile", "tile=512", "slice+tile", "slice+tile=64"])
def test_a_vae_mode_is_read_back_from_its_name(text: str) -> None:
    assert VaeMode.parse(text).text == text


@pytest.mark.parametrize("text", ["tiles", "tile=", "tile+slice", "tile=0", "x"])
def test_what_names_no_vae_mode_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        VaeMode.parse(text)


SECOND_TIME = """
import sys
from planner.dryrun.provider import Traces
from planner.dryrun.trace import VaeMode
from planner.models import resolve
from planner.types import Workload
traces = Traces.of(resolve(sys.argv[1]), Workload(num_inference_steps=3))
trace = traces.trace(None, 2, (VaeMode(True),))
modes = sorted({mode for _, mode in trace.variants})
print(trace.count(trace.events[1].call), traces.workload.num_inference_steps, traces.facts.class_name, modes)
assert "torch" not in sys.modules and "diffusers" not in sys.modules
"""


@pytest.mark.slow
def test_a_cached_model_needs_no_torch_and_modes_add_up(cache: Path) -> None:
    source = resolve("stable-diffusion-v1-5")
    traces = Traces.of(source, Workload(num_inference_steps=3))
    plain = traces.trace(None, 2)
    assert not plain.variants
    sliced = traces.trace(None, 2, (VaeMode(True),))
    tiled = traces.trace(None, 2, (VaeMode(False, 256),))
    assert {mode for _, mode in tiled.variants} == {"slice", "tile=256"}
    assert sliced.calls[0].total_flops == plain.calls[0].total_flops
    environment = os.environ | {"PLANNER_CACHE_DIR": str(cache.parent)}
    command = [sys.executable, "-c", SECOND_TIME, "stable-diffusion-v1-5"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[1:3] == ["3", "StableDiffusionPipeline"]
    assert "'slice', 'tile=256'" in done.stdout


def test_a_live_pipeline_is_never_written_to_disk(cache: Path) -> None:
    case = FAMILIES["ddpm"]
    pipe = case.build()
    traces = Traces.of(resolve(pipe), Workload(), case.inputs(pipe))
    assert traces.trace().steps == 2
    assert traces.facts.class_name == "DDPMPipeline"
    assert not cache.exists()
