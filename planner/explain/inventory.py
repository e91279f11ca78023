"""What there is: bundled GPUs and models, and what was detected on this machine, as text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from planner.explain.layout import DEFAULT_WIDTH, paragraph, table
from planner.units import format_bytes

if TYPE_CHECKING:
    from planner.hardware.doctor import DoctorReport

INDENT = 16


def render_profiles(width: int | None = None) -> str:
    """Bundled GPUs and models, one line each."""
    from planner.hardware.profiles import load_gpus
    from planner.models import list_profiles

    room = width or DEFAULT_WIDTH
    gpus = [("GPU", "memory", "architecture", "also called")]
    for gpu in load_gpus():
        also = ", ".join(dict.fromkeys((*gpu.commonest_of, *gpu.aliases)))
        gpus.append((gpu.name, format_bytes(gpu.total_bytes), gpu.architecture, also))
    models = [("model", "parameters", "dtype", "pipeline", "from")]
    for profile in list_profiles():
        models.append((profile.name, f"{profile.parameter_count / 1e9:.2f} B", profile.dtype, profile.pipeline_class, profile.hub_id))
    return "\n".join([*table(gpus, room, left=(0, 2, 3)), "", *table(models, room, left=(0, 2, 3, 4))]) + "\n"


def profiles_data() -> dict[str, Any]:
    """What ``planner profiles --json`` prints."""
    from planner.hardware.profiles import load_gpus
    from planner.models import list_profiles

    return {
        "schema": "planner.profiles/1",
        "gpus": [gpu.model_dump(mode="json") for gpu in load_gpus()],
        "models": [profile.model_dump(mode="json", exclude={"folder"}) for profile in list_profiles()],
    }


def render_doctor(report: DoctorReport, width: int | None = None) -> str:
    """What was detected, one block per device; every absence with its reason."""
    room = width or DEFAULT_WIDTH
    versions = ", ".join(f"{name} {version or 'absent'}" for name, version in report.versions.items())
    limit = f", limited by {report.host_limited_by}" if report.host_limited_by else ""
    facts = [("python", f"{report.python} on {report.system}"), ("versions", versions)]
    facts.append(("driver", f"{report.driver} (CUDA {report.driver_cuda})" if report.driver else "no NVIDIA driver found"))
    if report.torch_cuda_problem:
        facts.append(("torch", report.torch_cuda_problem))
    host = f"{format_bytes(report.host_free_bytes)} free of {format_bytes(report.host_total_bytes)}{limit}"
    blocks = [[line for label, text in (*facts, ("host RAM", host)) for line in paragraph(label, text, room, INDENT)]]
    blocks += [_device(health, room) for health in report.devices]
    if report.problems:
        blocks.append([line for problem in report.problems for line in paragraph("warning", problem, room, INDENT)])
    return "\n\n".join("\n".join(block) for block in blocks) + "\n"


def _device(health: Any, width: int) -> list[str]:
    device = health.device
    free = f", {format_bytes(device.free_bytes)} free" if device.free_bytes is not None else ""
    lines = paragraph("device", f"{device.name} ({device.architecture}), {format_bytes(device.total_bytes)}{free}", width, INDENT)
    lines += paragraph("figures", f"{device.basis}{f'; {device.note}' if device.note else ''}", width, INDENT)
    usable = [name for name, reason in health.backends.items() if reason is None]
    lines += paragraph("usable", ", ".join(usable) or "no optional backend", width, INDENT)
    rows = [(name, reason) for name, reason in health.backends.items() if reason is not None]
    for place, (name, reason) in enumerate(rows):
        lines += paragraph("not usable" if place == 0 else "", f"{name}: {reason}", width, INDENT)
    return lines
