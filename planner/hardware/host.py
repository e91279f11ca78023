"""RAM that a process here may use: the machine's, or its control group's limit where that is smaller."""

from __future__ import annotations

import os
from pathlib import Path

from planner.types import Device, Frozen
from planner.units import GIB

NO_LIMIT_BYTES = 1 << 60
"""cgroup v1 writes 0x7FFFFFFFFFFFF000 for "no limit"; anything this large is none."""
ASSUMED_BANDWIDTH_BYTES_PER_SECOND = 25.6e9
"""One channel of DDR4-3200, 8 bytes x 3.2 GT/s (JEDEC JESD79-4): low on purpose until a probe has measured."""
ASSUMED_CLOCK_HZ = 2.0e9
_FLOPS_PER_CYCLE = (("avx512f", 64), ("avx2", 32), ("avx", 16))
"""fp32, two FMA (AVX: multiply and add) units of that width per core: Intel and AMD optimization manuals."""


class MemoryLimit(Frozen):
    """One control group's limit and what it has in use, without page cache that the kernel would give back."""

    limit_bytes: int
    used_bytes: int
    path: str


class HostMemory(Frozen):
    """RAM in bytes. ``limited_by`` is the control group that sets the limit, None when the machine does."""

    total_bytes: int
    free_bytes: int
    limited_by: str | None = None


def host_memory(root: Path = Path("/")) -> HostMemory:
    """The smaller of free RAM and every enclosing cgroup's limit less its use."""
    import psutil

    memory = psutil.virtual_memory()
    total, free, limited_by = int(memory.total), int(memory.available), None
    for limit in cgroup_limits(root):
        total = min(total, limit.limit_bytes)
        left = max(0, limit.limit_bytes - limit.used_bytes)
        if left < free:
            free, limited_by = left, limit.path
    return HostMemory(total_bytes=total, free_bytes=free, limited_by=limited_by)


def cgroup_limits(root: Path = Path("/")) -> tuple[MemoryLimit, ...]:
    """Memory limits of this process's control group and its ancestors, version 2 or 1; empty without any.

    ``root`` is where ``proc`` and ``sys`` are found, for tests. Kernel documentation: cgroup-v2.rst and
    cgroup-v1/memory.rst.
    """
    limits = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if hierarchy == "0" and not controllers:
            names = ("memory.max", "memory.current", "inactive_file")
            limits += _walk(root / "sys/fs/cgroup", path, *names)
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            limits += _walk(root / "sys/fs/cgroup/memory", path, *names)
    return tuple(limits)


def _walk(mount: Path, path: str, limit_name: str, usage_name: str, cache_key: str) -> list[MemoryLimit]:
    """From the group up to the mount. Inside a container the named group may not exist: the mount is then its own."""
    folder = mount / path.strip("/")
    if ".." in Path(path).parts or not folder.is_dir():
        folder = mount
    found = []
    for group in (folder, *folder.parents):
        if not group.is_relative_to(mount):
            break
        limit, usage = _integer(group / limit_name), _integer(group / usage_name)
        if limit is not None and limit < NO_LIMIT_BYTES and usage is not None:
            used = max(0, usage - _statistic(group / "memory.stat", cache_key))
            found.append(MemoryLimit(limit_bytes=limit, used_bytes=used, path=str(group)))
    return found


def _read(path: Path) -> str:
    """The text, empty where there is no such file or no permission."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _integer(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.isdigit() else None


def _statistic(path: Path, key: str) -> int:
    for line in _read(path).splitlines():
        name, _, value = line.partition(" ")
        if name == key and value.strip().isdigit():
            return int(value)
    return 0


class CpuInfo(Frozen):
    """``flags`` are the kernel's names of instruction sets."""

    name: str
    cores: int
    clock_hz: float | None = None
    flags: frozenset[str] = frozenset()


def cpu_info(root: Path = Path("/")) -> CpuInfo:
    """From ``/proc/cpuinfo``; cores are those this process may run on."""
    fields: dict[str, str] = {}
    for line in _read(root / "proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    clock = fields.get("cpu MHz", "")
    return CpuInfo(
        name=fields.get("model name") or "CPU",
        cores=cores,
        clock_hz=float(clock) * 1e6 if clock.replace(".", "", 1).isdigit() else None,
        flags=frozenset(fields.get("flags", "").split()),
    )


def cpu_device(
    flops_per_second: float | None = None,
    bandwidth_bytes_per_second: float | None = None,
    *,
    note: str | None = None,
    root: Path = Path("/"),
) -> Device:
    """This machine's CPU. Pass what a probe measured; else peaks are assumed from cores, clock and vector width.

    16-bit arithmetic is given the fp32 rate: torch computes it by converting unless the CPU has its own units.
    """
    info, memory = cpu_info(root), host_memory(root)
    measured = flops_per_second is not None and bandwidth_bytes_per_second is not None
    flops = flops_per_second if flops_per_second is not None else assumed_cpu_flops_per_second(info)
    assumption = None if measured else f"peaks assumed from {info.cores} cores; a probe measures them"
    limit = f"RAM limited by {memory.limited_by}" if memory.limited_by else None
    return Device(
        name=info.name,
        kind="cpu",
        architecture="cpu",
        total_bytes=memory.total_bytes,
        free_bytes=memory.free_bytes,
        host_free_bytes=memory.free_bytes,
        flops_per_second={"fp32": flops, "bf16": flops, "fp16": flops},
        bandwidth_bytes_per_second=bandwidth_bytes_per_second or ASSUMED_BANDWIDTH_BYTES_PER_SECOND,
        basis="measured" if measured else "assumed",
        note="; ".join(text for text in (note, assumption, limit) if text) or None,
    )


def assumed_cpu_flops_per_second(info: CpuInfo) -> float:
    """fp32: cores x clock x FLOP per cycle of the widest vector unit (8 without AVX: SSE multiply and add)."""
    per_cycle = next((flops for flag, flops in _FLOPS_PER_CYCLE if flag in info.flags), 8)
    return info.cores * (info.clock_hz or ASSUMED_CLOCK_HZ) * per_cycle


def describe_host(memory: HostMemory) -> str:
    """``"12.3 of 24.0 GiB free"`` and what limits it."""
    text = f"{memory.free_bytes / GIB:.1f} of {memory.total_bytes / GIB:.1f} GiB free"
    return f"{text}, limited by {memory.limited_by}" if memory.limited_by else text
