"""Bundled models against what is published of them: built on ``meta``, parameters counted, sizes compared."""

from __future__ import annotations

from typing import Any

import pytest

from planner.models import ModelProfile, list_profiles, resolve
from planner.models.bundled import ParameterCount

PROFILES = {profile.name: profile for profile in list_profiles()}
ITEM_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


def elements(module: Any) -> tuple[int, int, int]:
    """Parameters, and with them the persistent buffers (files hold both), and the number of stored tensors."""
    parameters = sum(parameter.numel() for parameter in module.parameters())
    stored = {id(value): value.numel() for value in module.state_dict(keep_vars=True).values()}
    return parameters, sum(stored.values()), len(stored)


def agrees(count: ParameterCount, stored: int, tensors: int) -> bool:
    """Whether the built component is what was published. A file adds headers: some 150 bytes per tensor, 410 in a zip of torch."""
    published = count.published
    size = stored * ITEM_BYTES[published.dtype or "fp32"]
    if published.kind == "rounded":
        assert published.to is not None
        return abs(count.count - published.value) <= published.to / 2
    if published.kind == "tensor_bytes":
        return size == published.value
    header = 64 + 450 * tensors
    if published.kind == "file_bytes":
        return size < published.value <= size + header
    assert published.to is not None
    return published.value - published.to / 2 - header <= size <= published.value + published.to / 2


@pytest.fixture(scope="module", autouse=True)
def quiet() -> None:
    """Loading prints nothing here."""
    import diffusers
    import transformers

    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()


@pytest.mark.parametrize("name", PROFILES)
def test_every_component_has_the_published_number_of_parameters(name: str) -> None:
    import torch

    profile = PROFILES[name]
    pipeline = resolve(name).build()
    modules = {key: part for key, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    if name.startswith("animatediff"):  # its constructor merges unet and motion adapter
        modules = _before_merging(profile)
    assert set(profile.parameters) | set(profile.uncounted) == set(modules)
    for key, count in profile.parameters.items():
        parameters, stored, tensors = elements(modules[key])
        assert parameters == count.count, key
        assert agrees(count, stored, tensors), f"{key}: {count.published} against {stored} stored elements"
    assert all(p.device.type == "meta" for module in modules.values() for p in module.parameters())


def _before_merging(profile: ModelProfile) -> dict[str, Any]:
    from planner.models.bundled import bundled_layout
    from planner.models.meta import build_component

    layout = bundled_layout(profile.name)
    return {c.name: build_component(c, "fp16", "") for c in layout.components if c.name in profile.parameters}


def test_the_models_that_people_measure_are_bundled() -> None:
    asked = """stable-diffusion-v1-5 stable-diffusion-v1-5-img2img stable-diffusion-v1-5-inpainting
    stable-diffusion-v1-5-controlnet stable-diffusion-2-1 deepfloyd-if-stage-1 deepfloyd-if-stage-2 deepfloyd-if-stage-3
    stable-diffusion-x4-upscaler stable-diffusion-xl stable-diffusion-xl-refiner kolors stable-diffusion-3-medium
    stable-diffusion-3.5-large flux.1-dev flux.1-schnell flux.2-dev pixart-alpha pixart-sigma sana-1600m auraflow
    qwen-image z-image-turbo cogvideox-2b cogvideox-5b hunyuan-video wan2.1-t2v-1.3b wan2.1-t2v-14b wan2.2-t2v-a14b
    ltx-video mochi-1-preview stable-video-diffusion-xt animatediff-v1-5-2 stable-cascade kandinsky-2-2 audioldm2
    stable-audio-open"""
    assert set(asked.split()) <= set(PROFILES)


@pytest.mark.parametrize("name", PROFILES)
def test_every_number_names_its_source(name: str) -> None:
    profile = PROFILES[name]
    for count in profile.parameters.values():
        assert len(count.source.split()) >= 3
        assert (count.published.to is None) == (not count.published.kind.startswith("rounded"))
        assert (count.published.dtype is None) == (count.published.kind == "rounded")
    assert profile.configs_source
    assert profile.license
    assert profile.dtype_source


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("sdxl", "stable-diffusion-xl"),
        ("SDXL", "stable-diffusion-xl"),
        ("stabilityai/stable-diffusion-xl-base-1.0", "stable-diffusion-xl"),
        ("black-forest-labs/FLUX.1-dev", "flux.1-dev"),
        ("runwayml/stable-diffusion-v1-5", "stable-diffusion-v1-5"),
        ("stabilityai/stable-diffusion-x4-upscaler", "stable-diffusion-x4-upscaler"),
        ("Wan_2.1", None),
        ("wan2.1", "wan2.1-t2v-14b"),
    ],
)
def test_names_hub_ids_and_aliases_lead_to_the_profile(text: str, name: str | None) -> None:
    from planner.models.bundled import find_profile

    found = find_profile(text)
    assert (found.name if found else None) == name


def test_a_profile_counts_its_whole_model() -> None:
    """SDXL: 2,567,463,684 + 83,653,863 + 123,060,480 + 694,659,840."""
    assert PROFILES["stable-diffusion-xl"].parameter_count == 3_468_837_867


def test_profiles_hold_json_only() -> None:
    for profile in PROFILES.values():
        others = [p for p in profile.folder.rglob("*") if p.is_file() and p.suffix != ".json"]
        assert not others
