"""Coefficients of the cost model: a handful of global numbers per GPU generation, each with its source.

They live in ``calibration/coefficients/*.toml``; none belongs to a model or to a published row.
"""

from __future__ import annotations

import re
import tomllib
from functools import lru_cache
from typing import Annotated, Any

from pydantic import Field, ValidationError

from planner.errors import CalibrationError
from planner.resources import data_path
from planner.types import Basis, Device, Frozen

SCHEMA_VERSION = 1
Share = Annotated[float, Field(gt=0, le=1.5)]
Seconds = Annotated[float, Field(ge=0, lt=10)]


class Coefficients(Frozen):
    """How far a real device stays below its datasheet. Shares are of the peak or of the bandwidth.

    The time of a kernel is ``max(flops / (peak x share), bytes / (bandwidth x share)) + kernel_seconds``; a component call
    takes the larger of its kernels' sum and its operations times ``launch_seconds`` (the host's pace).
    """

    matmul_share: Share
    convolution_share: Share
    vector_share: Share | None = None
    """Products that run without tensor cores, such as fp32 ones where TF32 is absent or off; None: as with them."""
    attention_share: Share
    """Fused attention kernels (flash, efficient)."""
    cudnn_attention_share: Share | None = None
    """None: as ``attention_share``."""
    bandwidth_share: Share
    pointwise_per_flop: Annotated[float, Field(gt=0)] | None = None
    """Elements that pointwise and normalization kernels move per fp32 FLOP of the peak: instructions, not memory, limit them on
    devices with much bandwidth per multiprocessor. None: memory alone does."""
    kernel_seconds: Seconds
    launch_seconds: Seconds
    """Host time per eager operation, module and Python overhead included."""
    compiled_launch_seconds: Seconds
    """Host time per compiled kernel, without CUDA graphs."""
    call_seconds: Seconds
    """Host time per component call besides its operations (hooks, argument handling, scheduler)."""
    link_share: Share
    """Pinned copies over the link, share of the link's raw rate."""
    pageable_share: Share
    fresh_bytes_per_second: Annotated[float, Field(gt=0)]
    """Copies from the device into host memory allocated for them: its pages are faulted in and zeroed as they are written."""
    cached_file_bytes_per_second: Annotated[float, Field(gt=0)]
    """From a safetensors file that the host's memory still holds."""
    disk_bytes_per_second: Annotated[float, Field(gt=0)]
    """From a safetensors file that it does not."""
    stream_bytes_per_second: Annotated[float, Field(gt=0)]
    """What group offload's copy stream sustains at most, waits between its units included."""
    onload_module_seconds: Seconds
    """Host time per module that an offload hook moves."""
    sequential_module_seconds: Seconds
    """The same under sequential offload, whose hooks set each tensor of the module anew before it runs and after."""
    picture_bytes_per_second: Annotated[float, Field(gt=0)]
    """Host conversion of the result (float bytes of the final images) to pictures."""
    context_bytes: Annotated[int, Field(ge=0)]
    """Device memory of the CUDA context, kernels and libraries: not seen by torch's allocator."""
    blas_workspace_bytes: Annotated[int, Field(ge=0)]
    compile_seconds_per_kernel: Seconds
    autotune_seconds_per_matmul: Seconds
    quantize_bytes_per_second: Annotated[float, Field(gt=0)]
    peak_over_fp32: Annotated[float, Field(gt=0)] | None = None
    """Cap on the reachable 16-bit peak, in multiples of the fp32 peak: silicon that feeds no more, whatever its tensor cores could."""
    tensor_over_fp32: Annotated[float, Field(gt=0)] | None = None
    """16-bit peak over fp32 peak of the cards that the shares were fitted on: one with fewer tensor cores keeps them busier."""
    flops_per_joule: Annotated[float, Field(gt=0)] | None = None
    """Cap on the reachable 16-bit peak per watt of board power: cards that cannot hold their boost clock."""
    memory_error: Annotated[float, Field(ge=0, lt=1)]
    """Half width of the 90 % interval of a peak, relative to activations and workspace."""
    latency_error: Annotated[float, Field(ge=0, lt=2)]
    basis: Basis
    sources: dict[str, str]
    """Field name (or ``default``) to where its number comes from."""

    def source(self, name: str) -> str:
        """Where the named coefficient comes from."""
        return self.sources.get(name, self.sources["default"])


@lru_cache(maxsize=1)
def _tables() -> dict[str, Any]:
    path = data_path("calibration", "coefficients", "defaults.toml")
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise CalibrationError(f"{path.name}: the shipped coefficients cannot be read: {error}; reinstall the package.") from error
    if content.get("schema_version") != SCHEMA_VERSION:
        raise CalibrationError(f"{path.name}: schema_version is {content.get('schema_version')!r}, this version reads {SCHEMA_VERSION}.")
    return content


def host_of(device: Device) -> str:
    """``desktop`` for cards sold into desktop computers, whose processors launch faster, else ``server``; by the card's name."""
    return "desktop" if re.search(r"GeForce|TITAN|Quadro|\bRTX\b", device.name) else "server"


def default_coefficients(device: Device) -> Coefficients:
    """Coefficients for a device nobody measured yet, by its compute capability; an unknown one takes the base values.

    Raises:
        CalibrationError: the shipped file is broken; the message names the field.
    """
    tables = _tables()
    where = "cpu" if device.kind == "cpu" else "capability." + ".".join(map(str, device.compute_capability or ()))
    chosen = tables["cpu"] if device.kind == "cpu" else tables["capability"].get(where.removeprefix("capability."), {})
    base, host = tables["base"], tables.get("host", {}).get(host_of(device), {}) if device.kind == "cuda" else {}
    merged = base | host | chosen | {"sources": base["sources"] | host.get("sources", {}) | chosen.get("sources", {})}
    try:
        return Coefficients.model_validate(merged)
    except ValidationError as error:
        first = error.errors()[0]
        raise CalibrationError(f"defaults.toml: {where}.{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
