"""What ``planner doctor`` shows: devices, memory, versions, and which optional backends are usable on each device."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping
from typing import Any

from planner.errors import HardwareError
from planner.hardware.backends import usable_backends
from planner.hardware.detect import DetectedDevices, detect_devices, torch_without_cuda
from planner.hardware.nvml import NvmlReport, read_nvml
from planner.types import Device, Frozen

REQUIRED = ("torch", "diffusers", "transformers", "accelerate", "huggingface_hub", "safetensors", "nvidia-ml-py")
OPTIONAL = ("torchao", "xformers", "flash-attn", "sageattention", "triton", "bitsandbytes", "kernels")


class DeviceHealth(Frozen):
    """A device and, per optional backend, None when usable or the reason why not."""

    device: Device
    backends: dict[str, str | None]


class DoctorReport(Frozen):
    """Everything the command prints; versions of absent packages are None."""

    python: str
    system: str
    driver: str | None
    driver_cuda: str | None
    torch_cuda_problem: str | None
    versions: dict[str, str | None]
    host_total_bytes: int
    host_free_bytes: int
    host_limited_by: str | None
    devices: tuple[DeviceHealth, ...]
    gpus: NvmlReport
    """NVML's raw answers, also of GPUs that CUDA_VISIBLE_DEVICES hides, with the processes on them."""
    problems: tuple[str, ...]


def doctor_report(library: Any = None, environ: Mapping[str, str] | None = None) -> DoctorReport:
    """Reads the machine; imports neither torch nor diffusers and never raises for missing hardware."""
    detected = detect_devices(library, environ)
    gpus = _gpus(library)
    return DoctorReport(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        driver=gpus.driver_version,
        driver_cuda=gpus.cuda_driver_version,
        torch_cuda_problem=torch_without_cuda(),
        versions={name: _version(name) for name in (*REQUIRED, *OPTIONAL)},
        host_total_bytes=detected.host.total_bytes,
        host_free_bytes=detected.host.free_bytes,
        host_limited_by=detected.host.limited_by,
        devices=_health(detected),
        gpus=gpus,
        problems=detected.problems,
    )


def _health(detected: DetectedDevices) -> tuple[DeviceHealth, ...]:
    return tuple(DeviceHealth(device=device, backends=usable_backends(device)) for device in detected.devices)


def _gpus(library: Any) -> NvmlReport:
    """Empty without NVML; the reason is among the detected problems already."""
    try:
        return read_nvml(library)
    except HardwareError:
        return NvmlReport()


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
