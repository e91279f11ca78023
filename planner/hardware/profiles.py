"""GPU descriptions from ``profiles/gpus/*.toml``: read, checked, and found by exact name.

Figures keep the datasheets' units (MiB, GB/s, TFLOP/s dense) so that they can be compared with their sources;
the properties convert to bytes and operations per second.
"""

from __future__ import annotations

import difflib
import tomllib
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Generic, Literal, TypeVar

from pydantic import Field, ValidationError

from planner.errors import HardwareError, ProfileError
from planner.resources import data_path
from planner.types import Device, Frozen
from planner.units import KIB, MIB

SCHEMA_VERSION = 1
MAX_FILE_BYTES = 1 << 20
PCIE_GB_PER_SECOND_PER_LANE = {1: 0.25, 2: 0.5, 3: 8 / 8 * 128 / 130, 4: 16 / 8 * 128 / 130, 5: 32 / 8 * 128 / 130}
"""GT/s over 8 bits, less the line code (8b/10b up to generation 2, 128b/130b after): PCI Express Base Specification."""
SAME_MEMORY_TOLERANCE = 0.08
"""Cards of one NVML name are told apart by memory; ECC takes up to 1/16 of it, variants differ by 20 % or more."""

T = TypeVar("T")
Positive = Annotated[float, Field(gt=0, lt=1e9)]
"""Far above any figure in its unit; neither infinite nor no number."""
Throughput = Literal["fp32", "tf32", "fp16", "bf16", "fp8", "int8"]


class Figure(Frozen, Generic[T]):
    """A number and the key of the source in the same file that it was taken from."""

    value: T
    source: str


class Source(Frozen):
    """Where figures come from."""

    title: str
    url: str
    date: str | None = None
    note: str | None = None


class GpuProfile(Frozen):
    """One GPU. ``name`` is unique; ``nvml_name`` is given where NVML reports another card's name for it."""

    name: str
    nvml_name: str | None = None
    family: str
    commonest_of: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    note: str | None = None
    architecture: str
    compute_capability: Figure[tuple[int, int]]
    memory_mib: Figure[Annotated[int, Field(gt=0, lt=1 << 40)]]
    bandwidth_gb_per_second: Figure[Positive]
    pcie_generation: Figure[Annotated[int, Field(ge=1, le=5)]] | None = None
    pcie_lanes: Figure[Annotated[int, Field(ge=1, le=16)]] | None = None
    link_gb_per_second: Figure[Positive] | None = None
    """Host link each way, where it is not PCIe."""
    sm_count: Figure[Annotated[int, Field(gt=0, lt=1 << 20)]] | None = None
    boost_mhz: Figure[Positive] | None = None
    l2_mib: Figure[Positive] | None = None
    power_watts: Figure[Positive] | None = None
    tflops: dict[Throughput, Figure[Positive]] = Field(min_length=1)

    @property
    def reported_name(self) -> str:
        """The name NVML gives."""
        return self.nvml_name or self.name

    @property
    def total_bytes(self) -> int:
        return self.memory_mib.value * MIB

    @property
    def bandwidth_bytes_per_second(self) -> float:
        return self.bandwidth_gb_per_second.value * 1e9

    @property
    def flops_per_second(self) -> dict[str, float]:
        """Dense peaks per second; fp16 and bf16 with fp32 accumulation."""
        return {dtype: figure.value * 1e12 for dtype, figure in self.tflops.items()}

    @property
    def l2_bytes(self) -> int | None:
        return None if self.l2_mib is None else round(self.l2_mib.value * 1024) * KIB

    @property
    def link_bytes_per_second(self) -> float | None:
        """One direction of the host link at its raw rate; copies reach less (calibration measures it)."""
        if self.link_gb_per_second is not None:
            return self.link_gb_per_second.value * 1e9
        if self.pcie_generation is None or self.pcie_lanes is None:
            return None
        return pcie_bytes_per_second(self.pcie_generation.value, self.pcie_lanes.value)

    def figures(self) -> dict[str, Figure[object]]:
        """Every figure by its path inside the GPU's table, for checks and for showing sources."""
        found: dict[str, Figure[object]] = {}
        for field in type(self).model_fields:
            value = getattr(self, field)
            if isinstance(value, Figure):
                found[field] = value
        found.update({f"tflops.{dtype}": figure for dtype, figure in self.tflops.items()})  # type: ignore[misc]
        return found


class GpuFile(Frozen):
    """One file of ``profiles/gpus``."""

    schema_version: Literal[1]
    sources: dict[str, Source]
    gpu: tuple[GpuProfile, ...] = Field(min_length=1)


def pcie_bytes_per_second(generation: int, lanes: int) -> float | None:
    """Raw rate of one direction; None for a generation without an entry."""
    per_lane = PCIE_GB_PER_SECOND_PER_LANE.get(generation)
    return None if per_lane is None else per_lane * lanes * 1e9


def load_gpu_file(path: Path) -> GpuFile:
    """One profile file, checked.

    Raises:
        ProfileError: unreadable, unknown keys, a figure whose source is not in the file; says where inside the file.
    """
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ProfileError(f"{path.name}: larger than {MAX_FILE_BYTES} bytes; a GPU file holds a few kilobytes.")
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # also numbers of more digits than Python reads, and endless brackets
        raise ProfileError(f"{path.name}: cannot be read as TOML: {error}") from error
    try:
        loaded = GpuFile.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ProfileError(f"{path.name}: {_location(first['loc'])}: {first['msg']}") from error
    for index, gpu in enumerate(loaded.gpu):
        for field, figure in gpu.figures().items():
            if figure.source not in loaded.sources:
                raise ProfileError(f"{path.name}: gpu[{index}].{field}: source {figure.source!r} is not in [sources].")
    return loaded


def _location(parts: tuple[int | str, ...]) -> str:
    """``gpu[3].tflops.fp16`` from pydantic's tuple."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).lstrip(".")


@lru_cache(maxsize=8)
def load_gpu_files(folder: Path | None = None) -> tuple[GpuFile, ...]:
    """All files of a folder, default the bundled one.

    Raises:
        ProfileError: a broken file, or two GPUs that share a name or alias.
    """
    paths = sorted((folder or data_path("profiles", "gpus")).glob("*.toml"))
    files = tuple(load_gpu_file(path) for path in paths)
    owners: dict[str, str] = {}
    for path, loaded in zip(paths, files, strict=True):
        for gpu in loaded.gpu:
            for key in {_normalise(text) for text in (gpu.name, *gpu.aliases, *gpu.commonest_of)}:
                if owners.setdefault(key, gpu.name) != gpu.name:
                    raise ProfileError(f"{path.name}: {gpu.name}: the name {key!r} already means {owners[key]}.")
    return files


def load_gpus(folder: Path | None = None) -> tuple[GpuProfile, ...]:
    """All GPUs, in the order of the files. Raises ProfileError as :func:`load_gpu_files`."""
    return tuple(gpu for loaded in load_gpu_files(folder) for gpu in loaded.gpu)


def _normalise(name: str) -> str:
    """Lower case, no spaces, no vendor words: ``NVIDIA GeForce RTX 3060``, ``rtx 3060`` and ``rtx3060`` are one name."""
    words = name.lower().replace("_", " ").split()
    while words and words[0] in ("nvidia", "geforce"):
        words = words[1:]
    return "".join(words)


def find_gpu(name: str) -> tuple[GpuProfile, str | None]:
    """The GPU of that NVML name, alias or family, and a note when the name left a choice.

    Exact up to case, spaces and the words "NVIDIA" and "GeForce"; nothing is ever matched by part of its name.

    Raises:
        HardwareError: unknown; the message lists the nearest names.
    """
    wanted, gpus = _normalise(name), load_gpus()
    for gpu in gpus:
        if wanted in {_normalise(text) for text in gpu.commonest_of}:
            return gpu, _choice_note(name, gpu, gpus)
    for gpu in gpus:
        if wanted in {_normalise(text) for text in (gpu.name, *gpu.aliases)}:
            return gpu, None
    raise HardwareError(_unknown_message(name, wanted, gpus))


def _choice_note(name: str, chosen: GpuProfile, gpus: tuple[GpuProfile, ...]) -> str | None:
    others = [gpu.name for gpu in gpus if gpu.family == chosen.family and gpu.name != chosen.name]
    if not others:
        return None
    return (
        f"{name!r} is taken as {chosen.name} ({chosen.memory_mib.value / 1024:.0f} GiB), its commonest variant; "
        f"others: {', '.join(others)}."
    )


def _unknown_message(name: str, wanted: str, gpus: tuple[GpuProfile, ...]) -> str:
    spellings = {_normalise(gpu.family): gpu.name for gpu in gpus}
    spellings |= {_normalise(text): gpu.name for gpu in gpus for text in (gpu.name, *gpu.aliases, *gpu.commonest_of)}
    number = "".join(letter for letter in wanted if letter.isdigit())
    alike = [key for key in spellings if len(number) > 1 and number in key]
    close = [*sorted(alike, key=len), *difflib.get_close_matches(wanted, spellings, n=6, cutoff=0.5)]
    nearest = list(dict.fromkeys(spellings[key] for key in close))[:6]
    hint = f"Nearest: {', '.join(nearest)}." if nearest else "No name is near it."
    return f"GPU {name!r} is not among the {len(gpus)} known ones. {hint} `planner profiles` lists all."


def match_gpu(reported_name: str, total_bytes: int) -> GpuProfile | None:
    """The profile of a detected card: NVML's exact name, and its memory where several share that name."""
    wanted = _normalise(reported_name)
    named = [gpu for gpu in load_gpus() if wanted in {_normalise(text) for text in (gpu.reported_name, gpu.name, *gpu.aliases)}]
    near = [gpu for gpu in named if abs(total_bytes / gpu.total_bytes - 1) <= SAME_MEMORY_TOLERANCE]
    return min(near, key=lambda gpu: abs(gpu.total_bytes - total_bytes), default=None)


def device_from_profile(profile: GpuProfile, budget_bytes: int | None = None, note: str | None = None) -> Device:
    """The device a profile describes. ``budget_bytes`` None leaves it to the caller to take off driver and context."""
    return Device(
        name=profile.name,
        kind="cuda",
        architecture=profile.architecture,
        compute_capability=profile.compute_capability.value,
        total_bytes=profile.total_bytes,
        budget_bytes=budget_bytes,
        flops_per_second=profile.flops_per_second,
        bandwidth_bytes_per_second=profile.bandwidth_bytes_per_second,
        link_bytes_per_second=profile.link_bytes_per_second,
        l2_bytes=profile.l2_bytes,
        sm_count=None if profile.sm_count is None else profile.sm_count.value,
        power_watts=None if profile.power_watts is None else profile.power_watts.value,
        basis="datasheet",
        note=" ".join(text for text in (note, profile.note) if text) or None,
    )
