"""Which machine, driver and libraries measurements belong to. What differs in any of these is not comparable."""

from __future__ import annotations

import hashlib
import os
import re
import sys
from typing import Annotated

from pydantic import Field

from planner.types import Device, Frozen

_Text = Annotated[str, Field(max_length=200)]
_HARDWARE = ("kind", "name", "uuid", "cpu", "cores")


class DeviceKey(Frozen):
    """Identity of a calibration. ``hardware`` fields say whose it is, the others how it was set up."""

    kind: Annotated[str, Field(pattern=r"^(cuda|cpu|sim)$")]
    name: _Text
    uuid: _Text | None = None
    driver: _Text | None = None
    power_limit_watts: Annotated[float, Field(gt=0, lt=1e5)] | None = None
    cpu: _Text
    cores: Annotated[int, Field(ge=1, le=65536)]
    torch: _Text
    diffusers: _Text

    @property
    def digest(self) -> str:
        """A short hexadecimal name of the whole key."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]

    @property
    def file_stem(self) -> str:
        """``nvidia-a100-80gb-pcie-0123456789abcdef``: readable, and nothing but letters, digits and dashes."""
        return f"{re.sub(r'[^a-z0-9]+', '-', self.name.lower()).strip('-')[:60] or 'device'}-{self.digest}"

    def differences(self, other: DeviceKey) -> tuple[str, ...]:
        """``driver: 550.54 here, 535.12 there``, one entry per differing field."""
        mine, theirs = self.model_dump(), other.model_dump()
        return tuple(f"{name}: {mine[name]} here, {theirs[name]} there" for name in mine if mine[name] != theirs[name])

    def same_hardware(self, other: DeviceKey) -> bool:
        """Whether both are about one machine and device, whatever its software."""
        return all(getattr(self, name) == getattr(other, name) for name in _HARDWARE)


def device_key(device: Device) -> DeviceKey:
    """The key of a device of this machine. Never imports torch; NVML is asked for CUDA devices only."""
    from planner.dryrun.store import versions
    from planner.hardware.host import cpu_info

    info, found = cpu_info(), dict(versions())
    uuid = driver = power = None
    if device.kind == "cuda":
        uuid, driver, power = _nvml_identity(device.name)
    return DeviceKey(kind=device.kind, name=device.name[:200], uuid=uuid, driver=driver, power_limit_watts=power, cpu=info.name[:200],
                     cores=info.cores, torch=found["torch"], diffusers=found["diffusers"])  # fmt: skip


def _nvml_identity(name: str) -> tuple[str | None, str | None, float | None]:
    from planner.errors import HardwareError
    from planner.hardware.detect import visible_devices
    from planner.hardware.nvml import read_nvml

    try:
        report = read_nvml()
    except HardwareError:
        return None, None, None
    seen = visible_devices(report)
    # Profiles have names of their own; with a single visible GPU there is no doubt which one is meant.
    match = next((item for item in seen if item.name == name), seen[0] if len(seen) == 1 else None)
    if match is None:
        return None, report.driver_version, None
    return match.uuid, report.driver_version, match.power_limit_watts


def thread_count() -> int:
    """Threads that torch would use: its own answer where it is loaded, else the environment's, else all cores."""
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "get_num_threads"):
        return int(torch.get_num_threads())
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        text = os.environ.get(name, "")
        if text.isdigit() and int(text) > 0:
            return int(text)
    from planner.hardware.host import cpu_info

    return cpu_info().cores
