"""Names: what tables call a model or a text encoder, and what the planner calls it."""

from __future__ import annotations

import re

from planner.models.bundled import find_profile, list_profiles

_PROFILES: tuple[tuple[str, str], ...] = (
    # Order matters: the first pattern that is found names the profile.
    (r"sd-vae-ft-mse|stable-diffusion-v1-[45]\b|\bSD v?1(\.|-|\b)", "stable-diffusion-v1-5"),
    (r"stable-diffusion-2-1\b", "stable-diffusion-2-1"),
    (r"stable-diffusion-xl-base|\bSDXL\b", "stable-diffusion-xl"),
    (r"stable-diffusion-3\.5-large\b(?!-turbo)", "stable-diffusion-3.5-large"),
    (r"stable-diffusion-3-medium", "stable-diffusion-3-medium"),
    (r"FLUX\.1-schnell", "flux.1-schnell"),
    (r"FLUX\.1-dev|FLUX\.1 transformer", "flux.1-dev"),
    (r"PixArt-XL-2-512", "pixart-alpha-512"),
    (r"PixArt-XL-2|PixArt-alpha$", "pixart-alpha"),
    (r"PixArt-Sigma", "pixart-sigma"),
    (r"CogVideoX-2b", "cogvideox-2b"),
    (r"CogVideoX-5b|cogvideox-1\.0 \(5b\)", "cogvideox-5b"),
    (r"AnimateDiff", "animatediff"),
    (r"Latte", "latte"),
    (r"HunyuanDiT", "hunyuandit"),
    (r"Qwen-Image$", "qwen-image"),
    (r"Kolors", "kolors"),
)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

TORCH2_PIPELINES: dict[tuple[str, str], tuple[str, str, int]] = {
    # (pipeline, stage): profile, pipeline class, output side in pixels. Sources: the scripts printed above the table,
    # diffusers docs optimization/torch2.0.md at d6e432c38a. IF is its medium ("M") checkpoints; stage 3 upscales the
    # 64x64 image of stage 1. The SDXL script is not printed: its pipeline default of 1024x1024 is assumed.
    ("SD - txt2img", ""): ("stable-diffusion-v1-5", "StableDiffusionPipeline", 512),
    ("SD - img2img", ""): ("stable-diffusion-v1-5-img2img", "StableDiffusionImg2ImgPipeline", 512),
    ("SD - inpaint", ""): ("stable-diffusion-v1-5-inpainting", "StableDiffusionInpaintPipeline", 512),
    ("SD - controlnet", ""): ("stable-diffusion-v1-5-controlnet", "StableDiffusionControlNetPipeline", 512),
    ("SDXL - txt2img", ""): ("stable-diffusion-xl", "StableDiffusionXLPipeline", 1024),
    ("IF", "stage 1"): ("deepfloyd-if-i-m", "IFPipeline", 64),
    ("IF", "stage 2"): ("deepfloyd-if-ii-m", "IFSuperResolutionPipeline", 256),
    ("IF", "stage 3"): ("stable-diffusion-x4-upscaler", "StableDiffusionUpscalePipeline", 256),
}

_UNET = re.compile(r"^(StableDiffusion(?!3)|AnimateDiff|Kolors|IF|LatentConsistency|UNet)")
_DISTILLED = re.compile(r"^Flux|^QwenImage")
_T5 = {"Flux": "text_encoder_2", "StableDiffusion3": "text_encoder_3"}


def profile_name(model: str) -> str | None:
    """Bundled profile for a table's model text; else the hub id it contains; else None.

    >>> profile_name("CompVis/stable-diffusion-v1-4 / v1-5 era")
    'stable-diffusion-v1-5'
    >>> profile_name("Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    'Wan-AI/Wan2.1-T2V-1.3B-Diffusers'
    """
    for pattern, profile in _PROFILES:
        if re.search(pattern, model, re.IGNORECASE):
            return profile
    found = _HUB_ID.match(model)
    return found.group(0) if found else None


def variant_for(model: str, pipeline_class: str) -> str:
    """The bundled profile that runs the class with ``model``'s components; ``model`` itself when there is none.

    >>> variant_for("stable-diffusion-v1-5", "StableDiffusionControlNetPipeline")
    'stable-diffusion-v1-5-controlnet'
    """
    own = find_profile(model)
    if own is None or own.pipeline_class == pipeline_class:
        return model
    others = (other for other in list_profiles() if other.name.startswith(own.name) and other.pipeline_class == pipeline_class)
    return next((other.name for other in others), model)


def denoiser_name(pipeline_class: str) -> str:
    """``unet`` or ``transformer``: what the pipeline class calls its denoiser."""
    return "unet" if _UNET.match(pipeline_class) else "transformer"


def guides_by_embedding(pipeline_class: str) -> bool:
    """True where "no guidance" is the class's default call: guidance is an input, or needs a negative prompt."""
    return bool(_DISTILLED.match(pipeline_class))


def usual_dtype(pipeline_class: str) -> str:
    """Half precision a source means when it names none: fp16 for UNets, bf16 for transformers."""
    return "fp16" if denoiser_name(pipeline_class) == "unet" else "bf16"


def component_name(word: str, pipeline_class: str) -> str | None:
    """Component for a word such as ``T5-XXL`` or ``CLIP-L``; None when it names none.

    >>> component_name("T5", "FluxPipeline"), component_name("T5-XXL", "StableDiffusion3Pipeline")
    ('text_encoder_2', 'text_encoder_3')
    """
    text = word.strip().lower()
    if text in ("transformer", "unet"):
        return denoiser_name(pipeline_class)
    if re.fullmatch(r"transformer_2|vae|controlnet|text_encoder(_[234])?|image_encoder", text):
        return text
    if re.fullmatch(r"t5([-_]?xxl)?|umt5", text):
        return next((name for start, name in _T5.items() if pipeline_class.startswith(start)), "text_encoder")
    return {"clip-l": "text_encoder", "clip": "text_encoder", "clip-bigg": "text_encoder_2"}.get(text)
