"""What must be known of a pipeline, besides its trace, to decide which knobs apply. Plain data, cached with the trace.

Read off live or meta modules by :mod:`planner.dryrun.facts`; used by the knobs and the cost model without torch.
"""

from __future__ import annotations

from typing import Literal

from planner.types import Frozen

Role = Literal["denoiser", "vae", "text_encoder", "controlnet", "other"]


class Leaf(Frozen):
    """A module that owns tensors itself: what sequential and leaf-level offload move as one unit."""

    path: str
    class_name: str
    bytes: int
    linear_weight_bytes: int = 0
    buffer_bytes: int = 0
    """Part of ``bytes`` that are buffers: sequential offload leaves them on the device."""
    unsaved_buffer_bytes: int = 0
    """Part of ``buffer_bytes`` that is in no state dict."""


class ComponentFacts(Frozen):
    """One ``nn.Module`` component. Bytes are those of the parameters and buffers in the dtype they have now."""

    name: str
    class_name: str
    library: str
    role: Role
    dtype: str
    parameters: int
    weight_bytes: int
    """Bytes of the whole component as stored now (quantized weights: their real storage)."""
    linear_parameters: int = 0
    leaves: tuple[Leaf, ...] = ()
    tied_weights: bool = False
    """One tensor belongs to several modules."""
    block_paths: tuple[str, ...] = ()
    """Children of the top-level ModuleLists/Sequentials: what block-level group offload moves."""
    convolutions_2d: int = 0
    convolutions_3d: int = 0
    has_mixed_rank_weights: bool = False
    """Both 4-D and 5-D weights, or more than 4-D: ``channels_last`` raises."""
    has_attention_slice: bool = False
    """The top-level class has ``set_attention_slice``: ``pipe.enable_attention_slicing`` acts on it."""
    attention_dispatcher: tuple[int, int] = (0, 0)
    """Attention processors that obey ``set_attention_backend``, and all of them."""
    attention_processors: tuple[str, ...] = ()
    """Distinct processor class names."""
    attention_head_dims: tuple[int, ...] = ()
    """Distinct sizes of one attention head, where the attention modules tell."""
    repeated_blocks: tuple[str, ...] = ()
    supports_group_offloading: bool = True
    group_block_modules: tuple[str, ...] = ()
    has_tiling: bool = False
    has_slicing: bool = False
    tiling_on: bool = False
    slicing_on: bool = False
    tile_pixels: int | None = None
    """Smallest image side that tiling leaves whole, as configured."""
    tile_arguments: tuple[str, ...] = ()
    force_upcast: bool = False
    keep_in_fp32: tuple[str, ...] = ()
    can_cache: bool = False
    can_fuse_qkv: bool = False
    can_chunk_forward: bool = False
    can_cast_layerwise: bool = False
    """Has ``enable_layerwise_casting`` (diffusers models; transformers models do not)."""
    quantization: str | None = None
    """Scheme the weights already have, e.g. ``torchao``, ``bitsandbytes``, ``gguf``."""


class PipelineFacts(Frozen):
    """The pipeline around its components."""

    class_name: str
    components: tuple[ComponentFacts, ...]
    offload_sequence: tuple[str, ...]
    """``model_cpu_offload_seq`` split at ``->``; empty when the class has none."""
    excluded_from_offload: tuple[str, ...] = ()
    dtype: str
    device: str = "cpu"
    """Device type its weights are on now: ``cpu``, ``cuda``, ``meta`` …"""
    offload: str = "none"
    """Offload that is already in force, in the words of the ``offload`` knob."""
    opens_cache_context: bool = False
    has_current_timestep: bool = False
    """Exposes ``current_timestep``, which PAB and FasterCache ask for."""
    guides_in_two_calls: bool = False
    """May call its denoiser once with and once without the prompt in each step, instead of in one batch."""
    has_fuse_qkv_method: bool = False
    batch_argument: str | None = None
    """Call argument that multiplies the batch, such as ``num_images_per_prompt``."""
    vae_shares_dtype: bool = True
    """The pipeline never casts latents for its VAE, so both must have one dtype."""

    default_steps: int | None = None
    """Default of the call's ``num_inference_steps``."""
    scheduler: str | None = None
    inspects_scheduler: bool = False
    """Its call asks which arguments the scheduler's ``step`` takes (``prepare_extra_step_kwargs``)."""
    learns_variance: bool = False
    """The denoiser predicts the variance, too, and the scheduler splits it off."""
    scheduler_compatibles: tuple[str, ...] = ()
    """Scheduler classes that load from this scheduler's config."""

    def component(self, name: str) -> ComponentFacts:
        """The named component. Raises KeyError when there is none."""
        for component in self.components:
            if component.name == name:
                return component
        raise KeyError(name)

    def of_role(self, role: Role) -> tuple[ComponentFacts, ...]:
        """All components with that role, in the pipeline's order."""
        return tuple(component for component in self.components if component.role == role)
