"""What the measurements were made on, and what the clocks did meanwhile."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from benchmarks.gpu.records import Clocks, Machine
from planner.types import Device

PACKAGES = ("torch", "triton", "diffusers", "transformers", "accelerate", "torchao", "xformers", "numpy", "pydantic", "nvidia-ml-py",
            "diffusers-mm")  # fmt: skip
SAMPLE_SECONDS = 0.2
"""Between two readings of the clocks: a reading takes well under a millisecond of another core."""
_CLOCK_SM, _CLOCK_MEM, _CELSIUS = 1, 2, 0
_ROOT = Path(__file__).resolve().parents[2]


def describe(device: Device, threads: int, context_bytes: int | None = None, environ: Any = None) -> Machine:
    """Everything that a record says of its machine. Asks NVML for CUDA devices; what does not answer is None."""
    import torch

    from planner.calibrate.identity import device_key
    from planner.hardware.host import host_memory

    environ = os.environ if environ is None else environ
    key = device_key(device)
    allocator = None
    if device.kind == "cuda":
        conf = environ.get("PYTORCH_CUDA_ALLOC_CONF") or environ.get("PYTORCH_ALLOC_CONF") or ""
        allocator = f"{torch.cuda.get_allocator_backend()} {conf}".strip()
    return Machine(
        device=device, uuid=key.uuid, driver=key.driver, power_limit_watts=key.power_limit_watts, max_sm_hertz=_max_clock(device),
        context_bytes=context_bytes, allocator=allocator, cpu=key.cpu, cores=key.cores, threads=threads,
        host_bytes=host_memory().total_bytes, python=platform.python_version(), versions=versions(), commit=commit())  # fmt: skip


def versions() -> dict[str, str]:
    """Installed versions; CUDA and cuDNN as torch was built with."""
    import torch

    found: dict[str, str] = {}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    found.setdefault("torch", str(torch.__version__))
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    if torch.backends.cudnn.is_available():
        found["cudnn"] = str(torch.backends.cudnn.version())
    return found


def commit() -> str | None:
    """Commit of this checkout, ``+`` appended where files differ from it; None without git."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("+" if changed else "")


def _git(*words: str) -> str:
    return subprocess.run(("git", *words), cwd=_ROOT, capture_output=True, text=True, timeout=10, check=True).stdout.strip()


def _max_clock(device: Device) -> float | None:
    from planner.errors import HardwareError
    from planner.hardware.nvml import read_nvml

    if device.kind != "cuda":
        return None
    try:
        seen = [unit.max_sm_clock_hz for unit in read_nvml().devices if unit.name == device.name]
    except HardwareError:
        return None
    return float(seen[0]) if seen and seen[0] else None


class NvmlReader:
    """Clocks, power and memory of one GPU by UUID. ``library`` is pynvml, or what answers for it in tests."""

    def __init__(self, uuid: str | None, library: Any = None) -> None:
        self.library = library if library is not None else _pynvml()
        self.handle: Any = None
        if self.library is not None and uuid:
            with suppress(self.library.NVMLError, OSError):
                self.library.nvmlInit()
                self.handle = self.library.nvmlDeviceGetHandleByUUID(uuid)

    def ask(self, function: str, *arguments: Any) -> Any:
        """The answer, or None where driver or pynvml has none."""
        call = getattr(self.library, function, None) if self.handle is not None else None
        if call is None:
            return None
        try:
            return call(self.handle, *arguments)
        except self.library.NVMLError:
            return None

    def used_bytes(self) -> int | None:
        """Memory in use on the whole GPU, as nvidia-smi counts it."""
        info = self.ask("nvmlDeviceGetMemoryInfo")
        return None if info is None else int(info.used)

    def sample(self) -> tuple[float | None, float | None, float | None, float | None, int | None]:
        """SM clock and memory clock in hertz, watts, degrees, reasons for a lowered clock."""
        sm, memory = (self.ask("nvmlDeviceGetClockInfo", kind) for kind in (_CLOCK_SM, _CLOCK_MEM))
        milliwatts, celsius = self.ask("nvmlDeviceGetPowerUsage"), self.ask("nvmlDeviceGetTemperature", _CELSIUS)
        why = self.ask("nvmlDeviceGetCurrentClocksEventReasons")
        why = self.ask("nvmlDeviceGetCurrentClocksThrottleReasons") if why is None else why
        return (sm * 1e6 if sm else None, memory * 1e6 if memory else None, milliwatts / 1000 if milliwatts else None,
                float(celsius) if celsius is not None else None, int(why) if why is not None else None)  # fmt: skip


def _pynvml() -> Any:
    try:
        import pynvml
    except ImportError:
        return None
    return pynvml


@contextmanager
def watched(reader: NvmlReader | None) -> Iterator[Callable[[], Clocks | None]]:
    """Sample the clocks while the block runs; the function gives what was seen, after the block."""
    samples: list[tuple[float | int | None, ...]] = []
    stop = threading.Event()

    def loop() -> None:
        while not stop.is_set():
            if reader is not None:
                samples.append(reader.sample())
            stop.wait(SAMPLE_SECONDS)

    active = reader is not None and reader.handle is not None
    thread = threading.Thread(target=loop, daemon=True) if active else None
    if thread is not None:
        thread.start()
    try:
        yield lambda: clocks_of(samples) if samples else None
    finally:
        stop.set()
        if thread is not None:
            thread.join(timeout=5)


def clocks_of(samples: list[tuple[float | int | None, ...]]) -> Clocks:
    """Least, median and most of each reading."""

    def three(index: int) -> tuple[float, float, float] | None:
        known = sorted(float(sample[index]) for sample in samples if sample[index] is not None)  # type: ignore[arg-type]
        return (known[0], statistics.median(known), known[-1]) if known else None

    reasons = tuple(sorted({int(sample[4]) for sample in samples if sample[4] is not None}))
    return Clocks(sm_hertz=three(0), memory_hertz=three(1), watts=three(2), celsius=three(3), throttle_reasons=reasons)


__all__ = ["NvmlReader", "SAMPLE_SECONDS", "clocks_of", "commit", "describe", "versions", "watched"]
