"""Every family of the zoo, and more classes built from the families' components, get through the dry run."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import pytest
import torch
from torch import nn

from planner.dryrun.inputs import call_arguments
from planner.dryrun.run import DryRun
from planner.dryrun.trace import VaeMode
from planner.types import Workload
from tests.zoo import FAMILIES

MODES = (VaeMode(True), VaeMode(False, 0))

OTHERS = {
    "StableDiffusionXLImg2ImgPipeline": "sdxl", "StableDiffusionXLPAGInpaintPipeline": "sdxl_inpaint",
    "StableDiffusionXLControlNetImg2ImgPipeline": "sdxl_controlnet", "StableDiffusionXLControlNetPAGPipeline": "sdxl_controlnet",
    "StableDiffusion3Img2ImgPipeline": "sd3", "StableDiffusion3PAGPipeline": "sd3", "QwenImageInpaintPipeline": "qwen_image",
    "ZImageInpaintPipeline": "z_image", "Flux2KleinInpaintPipeline": "flux2_klein", "StableDiffusionSAGPipeline": "sd15_pag",
}  # fmt: skip
"""Classes that the zoo does not have, by the family whose components they can be built from; each showed a fault once."""


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_traced(name: str) -> None:
    case = FAMILIES[name]
    pipe = case.build()
    modules = {key: id(value) for key, value in vars(pipe).items()}
    trace = DryRun(pipe, Workload(), case.inputs(pipe)).trace(None, None, MODES)
    assert trace.events
    assert {event.call for event in trace.events} == set(range(len(trace.calls)))
    assert all(len(call) and call.method for call in trace.calls)
    assert trace.steps is None or trace.steps >= 1
    assert max(call.total_flops for call in trace.calls) > 0
    assert {key: id(value) for key, value in vars(pipe).items()} == modules
    devices = {t.device.type for part in pipe.components.values() if isinstance(part, nn.Module) for t in part.parameters()}
    assert devices == {"cpu"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux", "wan21_t2v", "kandinsky22_combined", "audioldm2", "stable_audio"])
def test_a_pipeline_that_has_run_before_is_traced_the_same(name: str) -> None:
    """Libraries install hooks and fill tables in the first run."""
    case = FAMILIES[name]
    pipe = case.build()
    before = DryRun(pipe, Workload(), case.inputs(pipe)).trace()
    case.run(pipe)
    after = DryRun(pipe, Workload(), case.inputs(pipe)).trace()
    assert [(call.name, call.total_flops) for call in after.calls] == [(call.name, call.total_flops) for call in before.calls]
    assert [event.call for event in after.events] == [event.call for event in before.events]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "base"), OTHERS.items())
def test_other_classes_built_from_a_familys_components_are_traced(name: str, base: str) -> None:
    cls: Any = getattr(diffusers, name)
    family = FAMILIES[base].build()
    wanted = inspect.signature(cls.__init__).parameters
    pipe = cls(**{key: value for key, value in family.components.items() if key in wanted})
    taken = inspect.signature(cls.__call__).parameters
    sizes = {side: 32 for side in ("height", "width") if side in taken}
    inputs = {key: value for key, value in FAMILIES[base].inputs(family).items() if key in taken}
    inputs["num_inference_steps"] = 4  # image-to-image classes keep a part of them
    arguments = call_arguments(pipe, Workload(**sizes), inputs, with_images=True)
    with torch.random.fork_rng(devices=[]):
        pipe(**arguments)
    trace = DryRun(pipe, Workload(), arguments).trace()
    assert "vae.decode" in [trace.calls[event.call].name for event in trace.events]


def test_a_pipeline_whose_components_keep_state_says_so() -> None:
    family = FAMILIES["sd15_pag"].build()
    cls = diffusers.StableDiffusionSAGPipeline
    wanted = inspect.signature(cls.__init__).parameters
    pipe = cls(**{key: value for key, value in family.components.items() if key in wanted})
    inputs = {"prompt": "a", "height": 32, "width": 32, "num_inference_steps": 2, "sag_scale": 0.5}
    trace = DryRun(pipe, Workload(), inputs).trace()
    assert any("keeps state" in note for note in trace.notes)
    assert [trace.count(index) for index, call in enumerate(trace.calls) if call.component == "unet"] == [2, 2]


def test_several_control_networks_are_one_component_with_all_their_work() -> None:
    case = FAMILIES["sd15_controlnet"]
    pipe = case.build()
    inputs = case.inputs(pipe)
    single = DryRun(pipe, Workload(), inputs).trace()
    both = type(pipe)(**{**pipe.components, "controlnet": [pipe.controlnet, pipe.controlnet]}, requires_safety_checker=False)
    doubled = DryRun(both, Workload(), inputs | {"image": [inputs["image"]] * 2, "controlnet_conditioning_scale": [1.0, 1.0]}).trace()
    work = [next(call.total_flops for call in trace.calls if call.component == "controlnet") for trace in (single, doubled)]
    assert work[1] == 2 * work[0]
