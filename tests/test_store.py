"""The calibration store: real files, real processes, nothing lost, nothing trusted, nothing fatal."""

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from planner.calibrate import learn, store
from planner.calibrate.identity import DeviceKey, device_key
from planner.calibrate.learn import Observation, learned_scales, robust_scale
from planner.calibrate.samples import Rate, Run, Sample
from planner.calibrate.store import Contents, Store, parse_contents
from planner.errors import CalibrationError
from planner.hardware.host import cpu_device
from planner.types import Estimate, Measurement, Phase

KEY = DeviceKey(
    kind="cuda", name="Card X", uuid="GPU-1", driver="550.54", power_limit_watts=300.0, cpu="C", cores=8, torch="2.13.0", diffusers="0.42.1"
)
OTHER = KEY.model_copy(update={"name": "Card Y", "uuid": "GPU-2"})
NEWER = KEY.model_copy(update={"driver": "560.00"})
SAMPLE = Sample(signature='["aten.silu.default", [], {}]', threads=1, repetitions=(1.0, 2.0, 3.0))


def run(identity: str = "r1", seconds: float = 0.5) -> Run:
    rate = Rate(name="launch", units=10, repetitions=(seconds,), threads=1)
    return Run(id=identity, date="2026-01-02T03:04:05+00:00", quick=True, complete=True, threads=1, samples=(SAMPLE,), rates=(rate,))


def estimate(peak: int, weights: int, seconds: float) -> Estimate:
    phase = Phase(name="a", component="unet", calls=1, seconds=seconds, weights_bytes=weights, activations_bytes=0, workspace_bytes=0,
                  peak_allocated_bytes=peak, bound="compute")  # fmt: skip
    known: dict[str, float | None] = {
        "peak_allocated_bytes": peak, "peak_reserved_bytes": peak, "device_used_bytes": peak, "host_bytes": 0,
        "latency_seconds": seconds, "step_seconds": None, "setup_seconds": 0.0,
    }  # fmt: skip
    numbers = {f"{name}{end}": value for name, value in known.items() for end in ("", "_low", "_high")}
    return Estimate(fits=True, phases=(phase,), basis="measured", **numbers)


@pytest.fixture
def here(tmp_path: Path) -> Store:
    return Store(tmp_path / "calibration")


def test_what_is_stored_is_read_back_by_another_store(here: Store) -> None:
    here.add_run(KEY, run())
    here.add_samples(KEY, [SAMPLE])
    again = Store(here.directory).load(KEY)
    assert again.runs == (run(),)
    assert again.by_key()[SAMPLE.signature, 1].seconds == 2.0
    assert Store(here.directory).load(OTHER) == Contents(key=OTHER), "another device has measurements of its own"
    assert parse_contents(again.to_text()) == again


def test_a_new_sample_replaces_the_old_one_of_the_same_threads_only(here: Store) -> None:
    other_threads = SAMPLE.model_copy(update={"threads": 2})
    here.add_samples(KEY, [SAMPLE, other_threads])
    here.add_samples(KEY, [SAMPLE.model_copy(update={"repetitions": (7.0,)})])
    found = here.load(KEY).by_key()
    assert found[SAMPLE.signature, 1].repetitions == (7.0,)
    assert found[SAMPLE.signature, 2] == other_threads


def test_skipped_operations_are_not_kept(here: Store) -> None:
    here.add_samples(KEY, [Sample(signature="x", threads=1, skipped="too large")])
    assert not here.load(KEY).samples
    assert not here.path(KEY).exists()


def test_limits_drop_the_oldest(here: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "MAX_RUNS", 2)
    monkeypatch.setattr(store, "MAX_SAMPLES", 2)
    for name in ("a", "b", "c"):
        here.add_run(KEY, run(name))
        here.add_samples(KEY, [SAMPLE.model_copy(update={"signature": name})])
    assert [item.id for item in here.load(KEY).runs] == ["b", "c"]
    assert [item.signature for item in here.load(KEY).samples] == ["b", "c"]


def put(here: Store, text: bytes) -> Path:
    path = here.path(KEY)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text)
    return path


def stored(**changes: object) -> bytes:
    return json.dumps(json.loads(Contents(key=KEY, runs=(run(),)).to_text()) | changes).encode()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "file"),
        (b"{", "file"),
        (b"[1, 2]", "file"),
        (b"[" * 100_000, "file"),
        (b"\xff\xfe\x00", "file"),
        (stored(schema_version=99), "schema_version"),
        (stored(schema_name="other"), "schema_name"),
        (stored(extra=1), "extra"),
        (stored(runs=[{"id": "../../x"}]), "runs"),
        (stored(samples=[{"signature": "a", "threads": 1, "repetitions": [-1.0]}]), "repetitions"),
        (b'{"schema_name": "planner.calibration", "key": NaN}', "key"),
        (Contents(key=OTHER).to_text().encode(), "another device"),
        (Contents(key=NEWER).to_text().encode(), "driver: 550.54 here, 560.00 there"),
        (stored()[:-40], "file"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_trusted_is_moved_aside_told_and_replaced(
    here: Store, caplog: pytest.LogCaptureFixture, text: bytes, reason: str
) -> None:
    path = put(here, text)
    with caplog.at_level(logging.WARNING):
        assert here.load(KEY) == Contents(key=KEY)
    assert reason in caplog.text
    assert not path.exists()
    assert path.with_suffix(".bad").read_bytes() == text, "what was there is kept for a person to look at"
    here.add_run(KEY, run())
    assert Store(here.directory).load(KEY).runs == (run(),)


def test_a_file_larger_than_the_limit_is_not_parsed(here: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(here, stored())
    monkeypatch.setattr(store, "MAX_FILE_BYTES", 100)
    assert here.load(KEY) == Contents(key=KEY)
    assert path.with_suffix(".bad").exists()


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
fields = st.sampled_from(["schema_name", "schema_version", "key", "runs", "samples", "observations"])


@given(st.binary(max_size=300) | st.dictionaries(fields, json_values, max_size=6).map(lambda content: json.dumps(content).encode()))
@settings(max_examples=150, deadline=None)
def test_any_bytes_give_contents_or_a_calibration_error(text: bytes) -> None:
    try:
        contents = parse_contents(text)
    except CalibrationError:
        return
    assert parse_contents(contents.to_text()) == contents


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_a_damaged_file_never_gets_through_changed_in_kind(data: st.DataObject) -> None:
    text = bytearray(Contents(key=KEY, runs=(run(),), samples=(SAMPLE,)).to_text().encode())
    for _ in range(data.draw(st.integers(1, 4))):
        text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    try:
        contents = parse_contents(bytes(text))
    except CalibrationError:
        return
    for sample in contents.samples:
        assert all(0 < value < 1e5 for value in sample.repetitions)


# -- processes and disks --------------------------------------------------------------------------------------------

WRITER = """
import sys
from pathlib import Path
from planner.calibrate.identity import DeviceKey
from planner.calibrate.samples import Sample
from planner.calibrate.store import Store
store, key = Store(Path(sys.argv[1])), DeviceKey.model_validate_json(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
for number in range(int(sys.argv[4])):
    store.add_samples(key, [Sample(signature=f"{sys.argv[3]}{number}", threads=1, repetitions=(1.0,))])
assert "torch" not in sys.modules
"""


def start_writer(here: Store, name: str, count: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(here.directory), KEY.model_dump_json(), name, str(count)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.slow
def test_two_processes_writing_at_once_lose_nothing(here: Store) -> None:
    writers = [start_writer(here, name, 25) for name in ("a", "b")]
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for writer in writers:
        _, errors = writer.communicate(timeout=60)
        assert writer.returncode == 0, errors
    assert {sample.signature for sample in here.load(KEY).samples} == {f"{name}{number}" for name in "ab" for number in range(25)}


@pytest.mark.slow
def test_a_process_killed_while_writing_leaves_a_whole_file_and_no_lock(here: Store) -> None:
    here.add_run(KEY, run())
    writer = start_writer(here, "k", 100_000)
    assert writer.stdin is not None
    writer.stdin.write("go\n")
    writer.stdin.flush()
    deadline = time.monotonic() + 20
    while not here.load(KEY).samples and time.monotonic() < deadline:
        time.sleep(0.01)
    writer.send_signal(signal.SIGKILL)
    writer.wait(timeout=20)
    after = here.load(KEY)
    assert after.runs == (run(),)
    assert after.samples
    (here.directory / f".{here.path(KEY).stem}.left.tmp").write_text("half")
    here.add_samples(KEY, [SAMPLE])
    assert SAMPLE in here.load(KEY).samples
    assert not list(here.directory.glob("*.tmp")), "what a killed process left is cleaned up"
    assert not list(here.directory.glob(".*.tmp"))
    assert not list(here.directory.glob("*.bad"))


FILLED = """
import resource, sys
from pathlib import Path
from planner.calibrate.identity import DeviceKey
from planner.calibrate.samples import Sample
from planner.calibrate.store import Store
store, key = Store(Path(sys.argv[1])), DeviceKey.model_validate_json(sys.argv[2])
room = store.path(key).stat().st_size + 300
resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
for number in range(100):
    store.add_samples(key, [Sample(signature=f"{number}", threads=1, repetitions=(1.0,))])
print(len(store.load(key).samples))
"""


@pytest.mark.slow
def test_a_disk_that_fills_up_in_the_middle_of_a_write_loses_nothing_that_was_stored(here: Store) -> None:
    """A limit on file sizes is what a process sees of a full disk: writing stops in the middle of a file."""
    here.add_run(KEY, run())
    command = [sys.executable, "-c", FILLED, str(here.directory), KEY.model_dump_json()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "100\n"), done.stderr
    assert done.stderr.count("not kept") == 1
    after = Store(here.directory).load(KEY)
    assert after.runs == (run(),)
    assert 0 < len(after.samples) < 100, "what was written before the disk was full is there"
    assert sorted(path.suffix for path in here.directory.iterdir()) == [".json", ".lock"]


@contextmanager
def unprivileged() -> Iterator[None]:
    """Root writes anywhere: be nobody for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def open_directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def test_a_read_only_directory_is_done_without(open_directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    here = Store(open_directory / "calibration")
    here.add_run(KEY, run())
    here.path(KEY).chmod(0o644)
    here.directory.chmod(0o555)
    before = here.path(KEY).read_bytes()
    with unprivileged():
        here.add_samples(KEY, [SAMPLE])
        here.add_run(KEY, run("r2"))
        assert [item.id for item in here.load(KEY).runs] == ["r1", "r2"]
        assert here.load(KEY).samples == (SAMPLE,)
    here.directory.chmod(0o755)
    assert here.path(KEY).read_bytes() == before
    assert caplog.text.count("not kept") == 1
    here.add_run(KEY, run("r3"))
    assert [item.id for item in Store(here.directory).load(KEY).runs] == ["r1", "r2", "r3"], "kept as soon as the disk allows"


def test_a_directory_that_cannot_exist_is_done_without(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    here = Store(tmp_path / "file" / "calibration")
    here.add_samples(KEY, [SAMPLE])
    assert here.load(KEY).samples == (SAMPLE,)
    assert "not kept" in caplog.text
    assert here.show() == ()


def test_a_full_disk_leaves_the_old_file(here: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    here.add_run(KEY, run())

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.os, "fsync", full)
    here.add_samples(KEY, [SAMPLE])
    assert here.load(KEY).samples == (SAMPLE,)
    assert Store(here.directory).load(KEY) == Contents(key=KEY, runs=(run(),))
    assert sorted(path.suffix for path in here.directory.iterdir()) == [".json", ".lock"]


def test_changes_that_waited_do_not_undo_what_others_wrote(here: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(store.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(30, "read-only")))
        here.add_run(KEY, run("waiting"))
    Store(here.directory).add_run(KEY, run("other"))
    here.add_samples(KEY, [SAMPLE])
    assert [item.id for item in Store(here.directory).load(KEY).runs] == ["other", "waiting"]


# -- export, import, show -------------------------------------------------------------------------------------------


def test_export_and_import_carry_everything_over(here: Store, tmp_path: Path) -> None:
    here.add_run(KEY, run())
    here.add_samples(KEY, [SAMPLE])
    here.export(KEY, tmp_path / "out.json")
    there = Store(tmp_path / "elsewhere")
    there.add_run(KEY, run("r0"))
    there.import_(tmp_path / "out.json", KEY)
    there.import_(tmp_path / "out.json", KEY)
    assert sorted(item.id for item in there.load(KEY).runs) == ["r0", "r1"], "twice the same file adds nothing"
    assert there.load(KEY).samples == (SAMPLE,)
    assert [contents.key for contents in there.show()] == [KEY]


def test_a_foreign_file_is_imported_only_when_asked(here: Store, tmp_path: Path) -> None:
    here.add_run(OTHER, run())
    here.export(OTHER, tmp_path / "out.json")
    with pytest.raises(CalibrationError, match="uuid: GPU-1 here, GPU-2 there"):
        here.import_(tmp_path / "out.json", KEY)
    assert not here.load(KEY).runs
    assert here.import_(tmp_path / "out.json", KEY, foreign=True).runs == (run(),)


def test_export_of_nothing_and_import_of_nonsense_say_so(here: Store, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="nothing is stored"):
        here.export(KEY, tmp_path / "out.json")
    (tmp_path / "nonsense.json").write_text("{}")
    with pytest.raises(CalibrationError, match="key"):
        here.import_(tmp_path / "nonsense.json", KEY)
    with pytest.raises(CalibrationError, match=r"missing\.json"):
        here.import_(tmp_path / "missing.json", KEY)


def test_the_directory_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PLANNER_CACHE_DIR", str(tmp_path))
    assert store.calibration_directory() == tmp_path / "calibration"
    monkeypatch.delenv("PLANNER_CACHE_DIR")
    assert "diffusers-planner" in store.calibration_directory().parts


def test_a_key_names_this_cpu_and_a_file_name_is_harmless() -> None:
    key = device_key(cpu_device())
    assert key.kind == "cpu"
    assert key.uuid is None
    assert key.torch.startswith("2.")
    wicked = KEY.model_copy(update={"name": "../../etc/passwd\x00 ✓"})
    assert "/" not in wicked.file_stem
    assert wicked.file_stem.isascii()
    assert key.digest != KEY.digest


# -- learning -------------------------------------------------------------------------------------------------------


def test_an_observation_compares_what_is_above_the_weights() -> None:
    measured = Measurement(latency_seconds=3.0, peak_allocated_bytes=1600)
    seen = learn.observation("p", "s", estimate(1400, 1000, 2.0), measured, "2026-01-01T00:00:00", applied=(1.0, 1.2))
    assert seen.memory_ratio == pytest.approx(600 / 400)
    assert seen.time_ratio == pytest.approx(1.5 * 1.2), "the correction that the prediction contained is taken out first"
    blind = learn.observation("p", "s", estimate(1400, 1000, 2.0), Measurement(latency_seconds=2.0), "2026-01-01T00:00:00")
    assert blind.memory_ratio is None


def observations(ratios: list[float], pipeline: str = "p") -> list[Observation]:
    return [Observation(pipeline=pipeline, settings="s", date="2026-01-01", time_ratio=ratio) for ratio in ratios]


def test_a_handful_of_runs_removes_the_bias(here: Store) -> None:
    """The machine needs 1.3 times the time and 1.1 times the activations; each run is predicted with what was learned so far."""
    for wobble in (1.0, 1.02, 0.98, 1.01, 0.99):
        memory, seconds = here.corrections(KEY, "p")
        predicted = estimate(int(1000 + 400 * memory), 1000, 2.0 * seconds)
        measured = Measurement(latency_seconds=2.0 * 1.3 * wobble, peak_allocated_bytes=1000 + int(440 * wobble))
        here.record_observation(KEY, "p", "s", predicted, measured, (memory, seconds))
    memory, seconds = here.corrections(KEY, "p")
    assert memory == pytest.approx(1.1, rel=0.01)
    assert seconds == pytest.approx(1.3, rel=0.01)
    assert here.corrections(KEY, "another pipeline") == (1.0, 1.0)


@pytest.mark.parametrize("wild", [1e-4, 0.1, 20.0, 1e4])
def test_one_wild_run_poisons_nothing(wild: float) -> None:
    assert robust_scale([wild]) == 1.0
    assert robust_scale([wild, 1.1]) == pytest.approx(1.1)
    usual = [1.1, 1.12, 1.08, 1.1]
    for place in range(5):
        assert robust_scale([*usual[:place], wild, *usual[place:]]) == pytest.approx(1.1, rel=0.02)


def test_corrections_stay_within_a_sane_range() -> None:
    assert learned_scales(observations([100.0] * 5), "p") == (1.0, learn.TIME_RANGE[1])
    assert learned_scales(observations([0.001] * 5), "p") == (1.0, learn.TIME_RANGE[0])


def test_old_runs_are_forgotten() -> None:
    assert robust_scale([3.0] * 20 + [1.2] * learn.LAST) == pytest.approx(1.2)


@given(st.lists(st.floats(0.8, 1.25), min_size=3, max_size=9), st.floats(1e-3, 1e3), st.randoms())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_minority_of_wild_runs_keeps_the_scale_within_the_others(ratios: list[float], wild: float, random: object) -> None:
    mixed = [*ratios[: learn.LAST - 1], wild]
    random.shuffle(mixed)
    assert min(ratios) * 0.999 <= robust_scale(mixed) <= max(ratios) * 1.001
