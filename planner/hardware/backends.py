"""Optional packages: which are usable on a device, and why the others are not. Reads metadata only; imports none."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import re
from collections.abc import Callable

from planner.types import Device, Frozen


class Backend(Frozen):
    """What an optional package needs. ``capability`` is the least compute capability, None where a CPU will do."""

    module: str
    distribution: str
    least_version: str | None = None
    capability: tuple[int, int] | None = None
    linux_only: bool = False
    source: str


BACKENDS = (
    Backend(
        module="xformers",
        distribution="xformers",
        least_version="0.0.29",
        capability=(5, 0),
        source="diffusers 0.42.1 attention_dispatch; xformers README",
    ),
    Backend(
        module="flash_attn",
        distribution="flash-attn",
        least_version="2.6.3",
        capability=(8, 0),
        source="diffusers 0.42.1 attention_dispatch; flash-attention README: Ampere, Ada, Hopper",
    ),
    Backend(
        module="sageattention",
        distribution="sageattention",
        least_version="2.1.1",
        capability=(8, 0),
        source="diffusers 0.42.1 attention_dispatch; SageAttention README: Ampere and newer",
    ),
    Backend(
        module="torchao",
        distribution="torchao",
        least_version="0.15.0",
        source="diffusers 0.42.1 quantizers/torchao",
    ),
    Backend(
        module="triton",
        distribution="triton",
        capability=(7, 0),
        linux_only=True,
        source="Triton README, compatibility",
    ),
    Backend(
        module="bitsandbytes",
        distribution="bitsandbytes",
        least_version="0.43.3",
        capability=(6, 0),
        source="diffusers quantizers/bitsandbytes; bitsandbytes installation guide",
    ),
)


def _installed(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _pinned_torch(distribution: str) -> str | None:
    """The one torch version that compiled kernels were built for, when the package names it."""
    for requirement in importlib.metadata.requires(distribution) or ():
        match = re.match(r"torch\s*\(?==\s*([0-9][0-9.]*)", requirement)
        if match and "extra ==" not in requirement:
            return match.group(1)
    return None


def version_numbers(version: str) -> tuple[int, ...]:
    """``(2, 13, 0)`` of ``"2.13.0+cpu"``; a suffix such as ``rc1`` is left out."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in match.group().split(".")) if match else ()


def usable_backends(
    device: Device,
    *,
    installed: Callable[[str], str | None] = _installed,
    importable: Callable[[str], bool] = _importable,
    pinned_torch: Callable[[str], str | None] = _pinned_torch,
    system: str | None = None,
) -> dict[str, str | None]:
    """Module name to None when usable on ``device``, else the reason. The callables are replaced in tests."""
    system = platform.system() if system is None else system
    torch = installed("torch")
    found: dict[str, str | None] = {}
    for backend in BACKENDS:
        version = installed(backend.distribution)
        reason = _install_problem(backend, version, importable(backend.module))
        if reason is None and version is not None:
            reason = _torch_problem(pinned_torch(backend.distribution), torch)
        found[backend.module] = reason or _device_problem(backend, device, system)
    return found


def _install_problem(backend: Backend, version: str | None, importable: bool) -> str | None:
    if not importable:
        return f"not installed (pip install {backend.distribution})"
    if version is None:
        return f"a module {backend.module} is there, but no installed package {backend.distribution}: version unknown"
    least = backend.least_version
    if least is not None and version_numbers(version) < version_numbers(least):
        return f"version {version} is older than {least}, which diffusers needs"
    return None


def _torch_problem(pinned: str | None, torch: str | None) -> str | None:
    if torch is None:
        return "torch is not installed"
    if pinned is not None and version_numbers(pinned) != version_numbers(torch)[: len(version_numbers(pinned))]:
        return f"built for torch {pinned}, but torch {torch} is installed"
    return None


def _device_problem(backend: Backend, device: Device, system: str) -> str | None:
    if backend.linux_only and system != "Linux":
        return f"runs on Linux only, not on {system}"
    if backend.capability is None:
        return None
    if device.kind != "cuda":
        return f"needs a CUDA device, not {device.kind}"
    if device.compute_capability is not None and device.compute_capability < backend.capability:
        have, need = (".".join(map(str, pair)) for pair in (device.compute_capability, backend.capability))
        return f"needs compute capability {need}; {device.name} has {have}"
    return None
