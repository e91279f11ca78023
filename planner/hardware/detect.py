"""Which devices this process can use. Never imports torch: it is asked only where the process has loaded it already."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from planner.errors import HardwareError
from planner.hardware.assumed import device_from_nvml
from planner.hardware.host import HostMemory, cpu_device, host_memory
from planner.hardware.nvml import NvmlDevice, NvmlReport, describe_processes, read_nvml
from planner.types import Device, Frozen


class DetectedDevices(Frozen):
    """Devices in CUDA's order, the CPU last. ``problems`` says why a GPU is missing."""

    devices: tuple[Device, ...]
    problems: tuple[str, ...] = ()
    host: HostMemory


def detect_devices(library: Any = None, environ: Mapping[str, str] | None = None) -> DetectedDevices:
    """Every device a process with this environment sees. ``library`` stands in for pynvml in tests. Never raises."""
    host = host_memory()
    report, problems = _read(library)
    devices: list[Device] = []
    for seen in visible_devices(report, environ):
        try:
            devices.append(_described(seen, device_from_nvml(seen), host))
        except HardwareError as error:
            problems.append(str(error))
    if devices and (reason := torch_without_cuda()):
        problems.append(reason)
    return DetectedDevices(devices=(*devices, cpu_device()), problems=tuple(problems), host=host)


def detect_device(spec: Any = None, *, library: Any = None, torch: Any = None, environ: Mapping[str, str] | None = None) -> Device:
    """The device a plan is for: ``None`` (CUDA when there is one, else CPU), ``"cuda:1"``, ``"cpu"`` or a torch.device.

    ``library`` and ``torch`` stand in for pynvml and torch in tests. ``free_bytes`` counts blocks that torch caches
    but does not use as free.

    Raises:
        HardwareError: an unknown kind of device, an index that is not there, or CUDA asked for and unusable, and why.
    """
    torch = torch if torch is not None else sys.modules.get("torch")
    kind, index = _parse_spec(spec)
    if kind == "cpu":
        return cpu_device()
    report, problems = _read(library)
    reason = _cuda_unusable(torch, report, environ, problems)
    if reason is None:
        return _cuda_device(index, torch, report, environ)
    if kind == "cuda":
        raise HardwareError(f"{spec} was asked for, but {reason}. For a plan without the GPU, name one with --gpu.")
    return cpu_device(note=reason if report.devices else None)


def _parse_spec(spec: Any) -> tuple[str | None, int | None]:
    """``(kind, cuda_index)`` of a torch.device or its text."""
    if spec is None:
        return None, None
    match = re.fullmatch(r"(cuda|cpu)(?::(\d+))?", str(spec).strip())
    if match is None:
        raise HardwareError(f'device {str(spec)!r} is not supported; wanted "cuda", "cuda:<index>" or "cpu".')
    return match.group(1), None if match.group(2) is None else int(match.group(2))


def _read(library: Any) -> tuple[NvmlReport, list[str]]:
    try:
        report = read_nvml(library)
    except HardwareError as error:
        return NvmlReport(), [str(error)]
    return report, list(report.problems)


def _cuda_unusable(torch: Any, report: NvmlReport, environ: Mapping[str, str] | None, problems: list[str]) -> str | None:
    """Why no CUDA device can be used, None when one can."""
    if torch is not None and torch.cuda.is_available():
        return None
    if reason := torch_without_cuda(torch):
        return reason
    if not report.devices:
        return problems[0].rstrip(".") if problems else "NVML lists no GPU"
    if not visible_devices(report, environ):
        return f"CUDA_VISIBLE_DEVICES={_visible_text(environ)!r} hides every GPU"
    if torch is not None:
        return "torch.cuda.is_available() is false: driver and torch's CUDA version may not fit (`planner doctor`)"
    return None


def torch_without_cuda(torch: Any = None) -> str | None:
    """Why the installed torch has no CUDA, None when it has. Reads ``torch/version.py`` instead of importing it."""
    if torch is not None:
        version, cuda = getattr(torch, "__version__", "?"), torch.version.cuda
    else:
        spec = importlib.util.find_spec("torch")
        if spec is None or spec.origin is None:
            return "torch is not installed"
        path = Path(spec.origin).with_name("version.py")
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        found = {key: _assigned(text, key) for key in ("__version__", "cuda")}
        version, cuda = found["__version__"], found["cuda"]
    return None if cuda else f"torch {version} is a build without CUDA; install one with it"


def _assigned(text: str, name: str) -> str | None:
    match = re.search(rf"^{name}\b[^=\n]*=\s*'([^']*)'", text, re.MULTILINE)
    return match.group(1) if match else None


def _visible_text(environ: Mapping[str, str] | None) -> str | None:
    return (os.environ if environ is None else environ).get("CUDA_VISIBLE_DEVICES")


def visible_devices(report: NvmlReport, environ: Mapping[str, str] | None = None) -> tuple[NvmlDevice, ...]:
    """The GPUs and MIG instances that CUDA would show, in its order.

    CUDA_VISIBLE_DEVICES lists indices or (prefixes of) UUIDs; CUDA stops at the first that it does not know, and a
    GPU in MIG mode shows one instance only (CUDA C++ Programming Guide, environment variables; MIG User Guide).
    """
    text = _visible_text(environ)
    if text is None:
        return tuple(shown for device in report.devices if (shown := _shown(device)) is not None)
    seen: list[NvmlDevice] = []
    for entry in (part.strip() for part in text.split(",")):
        device = _named(report, entry)
        if device is None:
            break
        seen.append(device)
    return tuple(seen)


def _shown(device: NvmlDevice) -> NvmlDevice | None:
    if not device.mig_enabled:
        return device
    return device.mig[0] if device.mig else None


def _named(report: NvmlReport, entry: str) -> NvmlDevice | None:
    if entry.isdigit():
        return next((_shown(device) for device in report.devices if device.nvml_index == int(entry)), None)
    if not entry.upper().startswith(("GPU-", "MIG-")):
        return None
    everyone = [unit for device in report.devices for unit in (device, *device.mig)]
    named = [unit for unit in everyone if (unit.uuid or "").lower().startswith(entry.lower())]
    return _shown(named[0]) if len(named) == 1 else None


def _cuda_device(index: int | None, torch: Any, report: NvmlReport, environ: Mapping[str, str] | None) -> Device:
    host = host_memory()
    if torch is not None and torch.cuda.is_available():
        return _torch_device(index, torch, report, host)
    seen = visible_devices(report, environ)
    wanted = index or 0
    if wanted >= len(seen):
        names = ", ".join(f"cuda:{number} {device.name}" for number, device in enumerate(seen))
        raise HardwareError(f"cuda:{wanted} is not there; this process sees {names}.")
    return _described(seen[wanted], device_from_nvml(seen[wanted]), host)


def _torch_device(index: int | None, torch: Any, report: NvmlReport, host: HostMemory) -> Device:
    """Named by torch and matched to NVML by UUID, because CUDA and NVML may number GPUs differently."""
    count = torch.cuda.device_count()
    index = torch.cuda.current_device() if index is None else index
    if index >= count:
        raise HardwareError(f"cuda:{index} is not there; torch sees {count} CUDA device(s), the last is cuda:{count - 1}.")
    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    free += torch.cuda.memory_reserved(index) - torch.cuda.memory_allocated(index)
    known = _by_uuid(report, str(getattr(properties, "uuid", "")))
    seen = known or _facts_from_torch(properties, index, free, total)
    device = _described(seen, device_from_nvml(seen), host)
    # torch's own totals are what an allocation can get: the driver keeps a part of what NVML calls total.
    return device.model_copy(
        update={
            "total_bytes": int(total),
            "free_bytes": int(free),
            "compute_capability": (properties.major, properties.minor),
            "sm_count": properties.multi_processor_count,
        }
    )


def _by_uuid(report: NvmlReport, uuid: str) -> NvmlDevice | None:
    for device in report.devices:
        for unit in (device, *device.mig):
            if uuid and unit.uuid and unit.uuid.lower().removeprefix("gpu-").removeprefix("mig-") == uuid.lower():
                return _shown(unit)
    return None


def _facts_from_torch(properties: Any, index: int, free: int, total: int) -> NvmlDevice:
    """Where NVML is silent, torch's properties stand in; clocks (kHz) and bus width are there from torch 2.6 on."""
    clock, memory_clock = getattr(properties, "clock_rate", 0), getattr(properties, "memory_clock_rate", 0)
    return NvmlDevice(
        nvml_index=index,
        name=properties.name,
        total_bytes=int(properties.total_memory),
        free_bytes=int(free),
        used_bytes=max(0, int(total) - int(free)),
        compute_capability=(properties.major, properties.minor),
        sm_count=properties.multi_processor_count,
        max_sm_clock_hz=clock * 1000 or None,
        max_memory_clock_hz=memory_clock * 1000 or None,
        memory_bus_bits=getattr(properties, "memory_bus_width", 0) or None,
    )


def _described(seen: NvmlDevice, device: Device, host: HostMemory) -> Device:
    """With host memory and a word on who else uses the GPU."""
    others = describe_processes(seen.others())
    note = "; ".join(text for text in (device.note, others) if text) or None
    return device.model_copy(update={"host_free_bytes": host.free_bytes, "note": note})
