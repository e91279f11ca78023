"""Moving and offloading live components, and taking it back exactly."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from planner.dryrun.facts import pipeline_modules
from planner.files import ScratchFolder
from planner.knobs.base import Site, Undo
from planner.knobs.live import place_everything, place_module, reversible, tensor_slots
from planner.knobs.offload import group_type, kept_by

HOST = torch.device("cpu")


def move(site: Site) -> Undo:
    """Every component on the device; what is there already is left alone."""
    return reversible(site, lambda: place_everything(site, indexed(site.device)))


def whole(site: Site, *, sequential: bool) -> Undo:
    """Model or sequential offload through the pipeline's own method."""
    device = indexed(site.device)
    enable = site.pipe.enable_sequential_cpu_offload if sequential else site.pipe.enable_model_cpu_offload
    kept = sorted(kept_by(site.settings)) if sequential else []

    def change() -> None:
        if kept:
            site.pipe._exclude_from_cpu_offload = [*site.pipe._exclude_from_cpu_offload, *kept]
        # In place, so that the tensors which undo puts back are not held on the device meanwhile.
        place_everything(site, HOST)
        enable(device=device)

    return reversible(site, change, lambda: _remove_accelerate_hooks(site))


def _remove_accelerate_hooks(site: Site) -> None:
    """A failure may leave hooks on components whose top module has none yet, which ``remove_all_hooks`` overlooks."""
    from accelerate.hooks import remove_hook_from_module

    site.pipe.remove_all_hooks()
    for module in pipeline_modules(site.pipe).values():
        if any(hasattr(part, "_hf_hook") for part in module.modules()):
            remove_hook_from_module(module, recurse=True)


def group(site: Site, offload: str) -> Undo:
    """Group offload, component by component; those that cannot, or are to be kept, stay on the device."""
    kept = kept_by(site.settings)
    folder = ScratchFolder("planner-offload-") if site.settings.get("offload_disk") else None
    held: list[tuple[torch.Tensor, torch.Tensor]] = []
    """Weights on their way into files: until a component's hooks are complete, nothing else knows which file is whose."""

    def change() -> None:
        place_everything(site, HOST)
        if folder is not None:
            weakref.finalize(site.pipe, folder.remove)
            folder.make()
        for component in site.facts.components:
            module = pipeline_modules(site.pipe)[component.name]
            kind = None if component.name in kept else group_type(component, offload)
            # With tied weights the second group would write what the first has already emptied.
            path = None if folder is None or component.tied_weights else folder.path / component.name
            if kind is None:
                place_module(module, indexed(site.device))
                continue
            if path is not None:
                held.extend((tensor, tensor.data) for _, tensor in tensor_slots(module))
            _enable_group(site, module, kind, path)
            held.clear()

    def official() -> None:
        _disable_groups(site)
        for tensor, data in held:
            tensor.data = data
        if folder is not None:
            folder.remove()

    return reversible(site, change, official)


def _enable_group(site: Site, module: nn.Module, kind: str, folder: Path | None) -> None:
    from diffusers.hooks import apply_group_offloading

    apply_group_offloading(
        module,
        onload_device=indexed(site.device),
        offload_device=HOST,
        offload_type=kind,
        num_blocks_per_group=int(site.settings.get("offload_blocks", 1)) if kind == "block_level" else None,
        use_stream=bool(site.settings.get("offload_stream", False)),
        offload_to_disk_path=None if folder is None else str(folder),
    )


def _disable_groups(site: Site) -> None:
    """Take the hooks off in reverse (the registry drops later hooks otherwise), after reading back what is on disk."""
    from diffusers.hooks import group_offloading

    names = (
        group_offloading._LAZY_PREFETCH_GROUP_OFFLOADING,
        group_offloading._LAYER_EXECUTION_TRACKER,
        group_offloading._GROUP_OFFLOADING,
    )
    modules = pipeline_modules(site.pipe).values()
    for module in modules:
        for offloaded in _groups(module):
            _read_back(offloaded)
    for part in (part for module in modules for part in module.modules()):
        registry = getattr(part, "_diffusers_hook", None)
        if registry is not None:
            for name in names:
                # Interrupted while registering: the hook is listed but not in the registry's order yet.
                with contextlib.suppress(ValueError, IndexError):
                    registry.remove_hook(name, recurse=False)


def _groups(module: nn.Module) -> Iterator[Any]:
    seen: set[int] = set()
    for part in module.modules():
        registry = getattr(part, "_diffusers_hook", None)
        hook = None if registry is None else registry.get_hook("group_offloading")
        if hook is not None and id(hook.group) not in seen:
            seen.add(id(hook.group))
            yield hook.group


def _read_back(offloaded: Any) -> None:
    """Host copies become the tensors again: diffusers leaves uninitialised memory behind when it offloads to disk.

    A stream's host copies are pinned; the weights would keep that memory from being paged out for as long as they live.
    """
    for tensor, host in getattr(offloaded, "cpu_param_dict", {}).items():
        if not hasattr(type(tensor), "__tensor_unflatten__"):
            tensor.data = host.clone() if host.is_pinned() else host
    path = getattr(offloaded, "safetensors_file_path", None)
    if path is None or not offloaded._is_offloaded_to_disk:
        return
    import safetensors.torch

    loaded = safetensors.torch.load_file(path, device="cpu")
    for key, tensor in offloaded.key_to_tensor.items():
        tensor.data = loaded[key]


def indexed(device: Any) -> torch.device:
    """The device with its number: hooks compare ``cuda`` and ``cuda:0`` as different."""
    device = torch.device(device)
    if device.index is not None or device.type == "cpu":
        return device
    return torch.device(device.type, 0)
