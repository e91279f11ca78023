"""Changing attention processors on live modules. Undo restores the processor objects themselves, as the libraries'
own ``disable_*`` put others in their place (added-KV and joint processors break or lose SDPA)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from planner.dryrun.facts import attention_modules
from planner.knobs.attention import VANILLA
from planner.knobs.base import Site, Undo
from planner.knobs.live import modules_of, reversible


def use_vanilla(site: Site) -> Undo:
    """Processors that write out the attention scores instead of calling SDPA."""
    from diffusers.models import attention_processor

    def change() -> None:
        for part in _attentions(site):
            plain = VANILLA.get(type(part.processor).__name__)
            if plain is not None:
                part.set_processor(getattr(attention_processor, plain)())

    return reversible(site, change)


def use_sliced(site: Site) -> Undo:
    """``enable_attention_slicing`` with its default, half of the heads at a time."""
    return reversible(site, lambda: site.pipe.enable_attention_slicing("auto"))


def use_backend(site: Site, backend: str) -> Undo:
    """A dispatcher backend; the process-wide default that ``set_attention_backend`` also flips is put back at once."""
    aware = [part for part in _attentions(site) if hasattr(part.processor, "_attention_backend")]

    def change() -> None:
        from planner.snapshot import read_switches, write_switches

        before = {"attention_backend": read_switches()["attention_backend"]}
        try:
            for module in modules_of(site, "denoiser", "controlnet").values():
                if aware and hasattr(module, "set_attention_backend"):
                    module.set_attention_backend(backend)
        finally:
            write_switches(before)
        if not aware:
            site.pipe.enable_xformers_memory_efficient_attention()

    return reversible(site, change)


def _attentions(site: Site) -> Iterator[Any]:
    modules: list[nn.Module] = list(modules_of(site, "denoiser", "controlnet").values())
    for module in modules:
        for _, part in attention_modules(module):
            yield part
