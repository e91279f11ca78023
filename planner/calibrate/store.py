"""Measurements on disk: one JSON file per device, driver and library versions, in the user's cache directory.

Nothing read is trusted: a file that is too large, broken, of another machine or of other versions is moved aside to
``*.bad`` and reported. Nothing written is ever half there: a lock between processes, a temporary file, ``os.replace``.
A directory that cannot be written, or a full disk, is reported once and done without.

Format history: 1 first version.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from planner.calibrate.identity import DeviceKey
from planner.calibrate.learn import Observation, learned_scales, observation
from planner.calibrate.samples import Run, Sample
from planner.errors import CalibrationError
from planner.files import write_text
from planner.types import Estimate, Frozen, Measurement

logger = logging.getLogger(__name__)

MAX_FILE_BYTES = 64 << 20
MAX_SAMPLES, MAX_RUNS, MAX_OBSERVATIONS = 20_000, 20, 2_000
LOCK_SECONDS = 10.0
SampleKey = tuple[str, int]
_Change = Callable[["Contents"], "Contents"]


class Contents(Frozen):
    """All that is kept of one device. Coefficients are derived from ``runs`` when asked for, never stored."""

    schema_name: Literal["planner.calibration"] = "planner.calibration"
    schema_version: Literal[1] = 1
    key: DeviceKey
    runs: Annotated[tuple[Run, ...], Field(max_length=MAX_RUNS)] = ()
    samples: Annotated[tuple[Sample, ...], Field(max_length=MAX_SAMPLES)] = ()
    observations: Annotated[tuple[Observation, ...], Field(max_length=MAX_OBSERVATIONS)] = ()

    def by_key(self) -> dict[SampleKey, Sample]:
        """Samples by (signature, threads). A signature names shapes, strides and dtype."""
        return {(sample.signature, sample.threads): sample for sample in self.samples}

    def to_text(self) -> str:
        """Sorted keys, one line."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))


def calibration_directory() -> Path:
    """``$PLANNER_CACHE_DIR/calibration``, else the user's cache directory as the platform has it."""
    root = os.environ.get("PLANNER_CACHE_DIR")
    if root:
        return Path(root).expanduser() / "calibration"
    import platformdirs

    return Path(platformdirs.user_cache_dir("diffusers-planner")) / "calibration"


def parse_contents(text: bytes | str) -> Contents:
    """Contents of a calibration file.

    Raises:
        CalibrationError: not such a file; names the field.
    """
    if len(text) > MAX_FILE_BYTES:
        raise CalibrationError(f"it has {len(text)} bytes, more than the {MAX_FILE_BYTES} a calibration may have")
    try:
        return Contents.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_input=False, include_context=False)[0]
        raise CalibrationError(f"{'.'.join(str(part) for part in first['loc'])[:200] or 'file'}: {first['msg'][:300]}") from error


@dataclass(slots=True)
class Store:
    """Calibrations in one directory. Every method works without a writable disk; what cannot be kept lives in memory."""

    directory: Path = field(default_factory=calibration_directory)
    _pending: dict[str, list[_Change]] = field(default_factory=dict)
    """Changes that could not be written, by key digest: applied to whatever is read, and written once the disk allows."""
    _told: bool = False

    def path(self, key: DeviceKey) -> Path:
        """Where that device's measurements are."""
        return self.directory / f"{key.file_stem}.json"

    def load(self, key: DeviceKey) -> Contents:
        """What is known of the device; empty when nothing is, or when its file cannot be trusted."""
        return self._with_pending(key, self._read(key))

    def _with_pending(self, key: DeviceKey, contents: Contents | None) -> Contents:
        result = contents or Contents(key=key)
        for change in self._pending.get(key.digest, ()):
            result = change(result)
        return result

    def add_run(self, key: DeviceKey, run: Run) -> Contents:
        """Keep a run of the device probes. The oldest go when there are more than :data:`MAX_RUNS`."""
        return self._update(key, lambda old: old.model_copy(update={"runs": (*old.runs, run)[-MAX_RUNS:]}))

    def add_samples(self, key: DeviceKey, samples: Iterable[Sample]) -> Contents:
        """Keep operation samples; a new one takes the place of an older one of the same operation and threads."""
        new = {(sample.signature, sample.threads): sample for sample in samples if sample.repetitions}

        def merge(old: Contents) -> Contents:
            kept = [sample for known, sample in old.by_key().items() if known not in new]
            return old.model_copy(update={"samples": (*kept, *new.values())[-MAX_SAMPLES:]})

        return self._update(key, merge) if new else self.load(key)

    def record_observation(self, device_key: DeviceKey, pipeline_digest: str, settings_digest: str, predicted: Estimate,
                           measured: Measurement, applied: tuple[float, float] = (1.0, 1.0)) -> Contents:  # fmt: skip
        """Keep what one checked run of an applied plan showed. ``applied``: the corrections that ``predicted`` contains."""
        seen = observation(pipeline_digest, settings_digest, predicted, measured, now(), applied)
        return self._update(device_key, lambda old: old.model_copy(update={"observations": (*old.observations, seen)[-MAX_OBSERVATIONS:]}))

    def corrections(self, device_key: DeviceKey, pipeline_digest: str) -> tuple[float, float]:
        """(memory_scale, time_scale) that this pipeline's observed runs ask for."""
        return learned_scales(self.load(device_key).observations, pipeline_digest)

    # -- people's side ----------------------------------------------------------------------------------------------

    def show(self) -> tuple[Contents, ...]:
        """Every readable calibration in the directory, by file name. A broken one is reported and left."""
        found = []
        for path in sorted(self.directory.glob("*.json")):
            try:
                found.append(parse_contents(_bytes_of(path)))
            except (OSError, CalibrationError) as error:
                logger.warning("calibration %s cannot be read: %s", path, error)
        return tuple(found)

    def export(self, key: DeviceKey, path: Path) -> None:
        """Write one device's measurements to ``path``, in one step.

        Raises:
            CalibrationError: nothing is known of the device, or the file cannot be written.
        """
        contents = self.load(key)
        if not (contents.runs or contents.samples or contents.observations):
            raise CalibrationError(f"nothing is stored for {key.name} with this driver and torch; run planner calibrate first.")
        try:
            write_text(path, contents.to_text())
        except OSError as error:
            raise CalibrationError(f"{path} cannot be written: {error}") from error

    def import_(self, path: Path, key: DeviceKey, *, foreign: bool = False) -> Contents:
        """Take measurements from a file for the device ``key``; ``foreign=True`` takes another machine's as well.

        Raises:
            CalibrationError: unreadable, not a calibration, or of another device or version and not asked for; says how it differs.
        """
        try:
            given = parse_contents(_bytes_of(path))
        except (OSError, CalibrationError) as error:
            raise CalibrationError(f"{path}: {error}; wanted a file written by planner calibrate --export.") from error
        if given.key != key and not foreign:
            differing = "; ".join(key.differences(given.key))
            wanted = "ask for foreign measurements to take it anyway"
            raise CalibrationError(f"{path} belongs to another device or setup ({differing}); {wanted}.")

        def merge(old: Contents) -> Contents:
            runs = {run.id: run for run in (*given.runs, *old.runs)}
            samples = {**given.by_key(), **old.by_key()}
            seen = dict.fromkeys((*given.observations, *old.observations))
            return old.model_copy(update={"runs": tuple(sorted(runs.values(), key=lambda run: run.date))[-MAX_RUNS:],
                                          "samples": tuple(samples.values())[-MAX_SAMPLES:],
                                          "observations": tuple(sorted(seen, key=lambda one: one.date))[-MAX_OBSERVATIONS:]})  # fmt: skip

        return self._update(key, merge)

    # -- disk -------------------------------------------------------------------------------------------------------

    def _read(self, key: DeviceKey, locked: bool = False) -> Contents | None:
        """The file's contents; None when there is none, or when it cannot be trusted: it is then moved aside."""
        path = self.path(key)
        try:
            text = _bytes_of(path)
            contents = parse_contents(text)
            if contents.key == key:
                return contents
            owner = "other versions of this device's software" if contents.key.same_hardware(key) else "another device"
            reason = f"it was measured with {owner} ({'; '.join(key.differences(contents.key))})"
        except FileNotFoundError:
            return None
        except OSError as error:
            logger.warning("calibration %s cannot be read and is done without: %s", path, error)
            return None
        except CalibrationError as error:
            reason = str(error)
        self._set_aside(path, text, reason, locked)
        return None

    def _set_aside(self, path: Path, text: bytes, reason: str, locked: bool) -> None:
        """Move a file that is not trusted to ``*.bad``, unless another process has replaced it meanwhile."""
        import filelock

        try:
            with nullcontext() if locked else _lock(path):
                if _bytes_of(path) == text:
                    os.replace(path, path.with_suffix(".bad"))
            logger.warning("calibration %s is not used and was moved to %s: %s", path, path.with_suffix(".bad").name, reason)
        except (OSError, filelock.Timeout):
            logger.warning("calibration %s is not used: %s", path, reason)

    def _update(self, key: DeviceKey, change: _Change) -> Contents:
        """Read, change and replace under a lock that other processes honour."""
        import filelock

        path = self.path(key)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with _lock(path):
                _clean(path)
                changed = change(self._with_pending(key, self._read(key, locked=True)))
                write_text(path, changed.to_text())
            self._pending.pop(key.digest, None)
            return changed
        except (OSError, filelock.Timeout) as error:
            if not self._told:
                logger.warning("measurements are not kept: %s cannot be written (%s)", self.directory, error)
                self._told = True
            self._pending.setdefault(key.digest, []).append(change)
            return self.load(key)


def _lock(path: Path) -> Any:
    import filelock

    return filelock.FileLock(path.with_suffix(".lock"), timeout=LOCK_SECONDS)


def _clean(path: Path) -> None:
    """Remove what a killed process left half written; called under the lock, so nobody else is writing."""
    for left in path.parent.glob(f".{path.stem}.*.tmp"):
        with suppress(OSError):
            left.unlink()


def now() -> str:
    """The present second, UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _bytes_of(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(MAX_FILE_BYTES + 1)


def to_json(contents: Contents) -> dict[str, Any]:
    """A JSON-able form, for ``--show --json``."""
    parsed: dict[str, Any] = json.loads(contents.to_text())
    return parsed
