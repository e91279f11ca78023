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
from planner.dryrun.trace import Kind, VaeMode
from planner.errors import UsageError
from planner.types import Workload
from tests.zoo import FAMILIES
from tests.zoo.parts import controlnet, picture

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


def test_flex_attention_is_one_attention_and_says_so() -> None:
    decoder = diffusers.LTX2VideoDiffusionDecoderModel(
        out_channels=3, latent_channels=8, patch_size=2, decoder_head_dim=16, decoder_stage_channels=(64, 32, 16, 16, 16),
        decoder_stage_depths=(1, 1, 1, 1, 2), decoder_stage_kernels=((3, 3, 3),) * 4, decoder_t_emb_dim=32,
        decoder_upsample_strides=((1, 2, 2), (2, 1, 1), (2, 2, 2), (2, 2, 2)), decoder_upsample_channel_reductions=(2, 2, 1, 1),
        decoder_stage5_kernel=(3, 3, 3), spatial_compression_ratio=16, temporal_compression_ratio=8)  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = diffusers.LTX2VideoDiffusionDecodePipeline(diffusion_decoder=decoder, scheduler=scheduler, vae=None)
    trace = DryRun(pipe, Workload(), {"latents": torch.zeros(1, 8, 2, 3, 3), "output_type": "pt"}).trace()
    (call,) = [call for call in trace.calls if any("flex_attention" in text for text in call.fallbacks)]
    assert trace.output_shape == (1, 9, 3, 48, 48)
    assert int((call.columns["kind"] == int(Kind.ATTENTION)).sum()) == 6  # one per block of its stages


def test_a_call_that_says_what_to_make_gets_a_prompt_only_where_it_does_not_run_without() -> None:
    made, needy = FAMILIES["unidiffuser"], FAMILIES["sd15_img2img"]
    joint, pipe = made.build(), needy.build()
    inputs = {name: value for name, value in needy.inputs(pipe).items() if name != "prompt"}
    assert "prompt" not in call_arguments(joint, Workload(), made.inputs(joint))
    assert "prompt" not in call_arguments(pipe, Workload(), inputs)
    assert not any("no prompt" in note for note in DryRun(joint, Workload(), made.inputs(joint)).trace().notes)
    assert any("no prompt" in note for note in DryRun(pipe, Workload(), inputs).trace().notes)
    assert "prompt" in call_arguments(pipe, Workload(), inputs)
    assert "prompt" not in call_arguments(joint, Workload(), made.inputs(joint))


def test_a_call_without_any_subject_is_left_so_where_it_runs() -> None:
    """UniDiffuser makes both a text and a picture then; Stable Diffusion refuses and gets a prompt."""
    free, needy = FAMILIES["unidiffuser"].build(), FAMILIES["sd15"].build()
    inputs = {"height": 32, "width": 32, "num_inference_steps": 2}
    for pipe, prompted in ((free, False), (needy, True)):
        DryRun(pipe, Workload(), inputs).trace()
        assert ("prompt" in call_arguments(pipe, Workload(), inputs)) == prompted
        assert "prompt" in call_arguments(pipe, Workload(), {}, with_prompt=True)


@pytest.mark.parametrize(("name", "base", "added"), [
    ("AnimateDiffControlNetPipeline", "animatediff_video_controlnet", {}), ("CycleDiffusionPipeline", "sd15", {}),
    ("StableDiffusionControlNetPipeline", "sd15_controlnet", {"controlnet": [controlnet, controlnet]}),
])  # fmt: skip
def test_what_a_call_needs_besides_a_prompt_gets_stand_ins(name: str, base: str, added: dict[str, Any]) -> None:
    """As many frames as the call makes, a picture per control network, a prompt for the source."""
    kind = getattr(diffusers, name)
    parts = FAMILIES[base].build().components | {key: [make() for make in value] for key, value in added.items()}
    pipe = kind(
        **{key: value for key, value in parts.items() if key in inspect.signature(kind.__init__).parameters},
        **({"requires_safety_checker": False} if "requires_safety_checker" in inspect.signature(kind.__init__).parameters else {}),
    )
    sizes = {key: 32 for key in ("height", "width") if key in inspect.signature(kind.__call__).parameters}
    trace = DryRun(pipe, Workload(num_inference_steps=2, **sizes), {}).trace()
    assert trace.output_shape is not None
    assert trace.output_shape[0] == 1


def test_the_check_of_a_plan_gets_the_pictures_that_its_trace_got() -> None:
    pipe = FAMILIES["sd15_img2img"].build()
    inputs = {"num_inference_steps": 2, "output_type": "np"}
    trace = DryRun(pipe, Workload(batch_size=2), inputs).trace(None, 1)
    assert any("stand-in pictures" in note for note in trace.notes)
    assert {"prompt", "image"} <= set(call_arguments(pipe, Workload(batch_size=2), inputs))


def test_reference_pictures_that_all_samples_share_are_not_split() -> None:
    case = FAMILIES["flux2"]
    pipe = case.build()
    pictures = [picture(64, 64), picture(64, 64, seed=1)]
    inputs = {**case.inputs(pipe), "prompt": ["a", "b"], "image": pictures}
    with pytest.raises(UsageError, match="not one entry per sample"):
        DryRun(pipe, Workload(), inputs).trace(None, 1)
    alone = {name: value for name, value in inputs.items() if name != "image"}
    assert DryRun(pipe, Workload(), alone).trace(None, 1).batch_size == 1


def test_a_share_is_traced_with_the_texts_that_the_whole_batch_is_padded_to() -> None:
    case = FAMILIES["z_image"]
    pipe = case.build()
    run = DryRun(pipe, Workload(), {**case.inputs(pipe), "prompt": ["a", "a much longer text, to which the other one is padded"]})
    whole, part = run.trace(), run.trace(None, 1)
    assert whole.batch_size == 2 * part.batch_size == 2
    work = [sum(trace.calls[event.call].total_flops for event in trace.events) for trace in (whole, part)]
    assert 2 * work[1] >= work[0]


def test_several_control_networks_are_one_component_with_all_their_work() -> None:
    case = FAMILIES["sd15_controlnet"]
    pipe = case.build()
    inputs = case.inputs(pipe)
    single = DryRun(pipe, Workload(), inputs).trace()
    both = type(pipe)(**{**pipe.components, "controlnet": [pipe.controlnet, pipe.controlnet]}, requires_safety_checker=False)
    doubled = DryRun(both, Workload(), inputs | {"image": [inputs["image"]] * 2, "controlnet_conditioning_scale": [1.0, 1.0]}).trace()
    work = [next(call.total_flops for call in trace.calls if call.component == "controlnet") for trace in (single, doubled)]
    assert work[1] == 2 * work[0]
