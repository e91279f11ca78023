"""How a pipeline will be executed, in physical terms. Knobs write it, the cost model reads it; neither knows the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Self

Offload = Literal["none", "model", "sequential", "group_block", "group_leaf"]
Attention = Literal["flash", "efficient", "math", "cudnn", "vanilla", "sliced", "default"]
Fusion = Literal["none", "whole", "regional", "trace"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Physical description of one candidate. Defaults are plain eager execution with everything resident."""

    calls: int = 1
    """Pipeline calls the batch is split into."""
    dtype: str | None = None
    """``fp32 fp16 bf16``; None: as the pipeline is."""
    attention: Attention = "default"
    """Kernel class that runs each attention; ``default`` is what torch's SDPA would choose on the device."""
    vae_slicing: bool | None = None
    vae_tiling: bool | None = None
    vae_tile_pixels: int | None = None
    offload: Offload = "none"
    offload_stream: bool = False
    offload_blocks: int = 1
    offload_disk: bool = False
    resident: frozenset[str] = frozenset()
    """Components kept on the device although the rest is offloaded."""
    fusion: Fusion = "none"
    fuse_vae: bool = False
    cuda_graphs: bool = False
    autotuned: bool = False
    """``max-autotune``: better matmul kernels, longer compile."""
    channels_last: bool = False
    fused_qkv: bool = False
    tf32: bool = False
    cudnn_benchmark: bool = False
    settled: bool = False
    """The first run, in which cuDNN searches for algorithms, is over and its cache given back."""
    chunked_forward: bool = False
    weights: Mapping[str, str] = field(default_factory=dict)
    """Component to weight scheme: ``int8wo fp8wo int8dq fp8dq int4wo nf4 fp8_layerwise``."""
    steps_factor: float = 1.0
    """Share of the planned denoising steps that remains (another scheduler)."""
    denoiser_factor: float = 1.0
    """Share of denoiser work that remains (caches)."""
    only: Mapping[str, Recipe] = field(default_factory=dict)
    """Components that are treated otherwise than the rest, each with a recipe of its own."""

    def __hash__(self) -> int:
        values = (getattr(self, name) for name in _FIELDS)
        return hash(tuple(frozenset(value.items()) if isinstance(value, Mapping) else value for value in values))

    def of(self, component: str) -> Recipe:
        """The recipe that holds for one component."""
        return self.only.get(component, self)

    def but(self, **changes: Any) -> Self:
        """The same recipe with some fields changed: ``dataclasses.replace``, which a search calls too often for its price."""
        made = object.__new__(type(self))
        for name in _FIELDS:
            object.__setattr__(made, name, changes.pop(name) if name in changes else getattr(self, name))
        if changes:
            raise TypeError(f"a recipe has no {', '.join(changes)}")
        return made


_FIELDS = tuple(item.name for item in fields(Recipe))
