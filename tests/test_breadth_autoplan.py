"""Every family of the zoo is planned, applied, run and undone: the right output under the plan, the very same bits after it."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import numpy as np
import pytest
import torch

from planner import autoplan, explain
from planner.batching import batch_argument_of, samples_in, share
from planner.dryrun.run import DryRun
from planner.dryrun.trace import VaeMode
from planner.errors import UsageError
from planner.knobs import knob
from planner.types import Workload
from tests.zoo import FAMILIES, Case, as_array, seeded

QUICK = ("sd15", "flux", "wan21_t2v", "kandinsky22", "audioldm2", "ddpm", "unclip", "cascade_decoder")
NAMES = [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in FAMILIES]
UNCOMPILED = {"compile": "none"}
"""The compiler takes a minute per family and has tests of its own."""
TOLERANCE = 0.12
"""Mean difference from the untouched output relative to its range: 16 bits through a few layers of random weights."""


def bits(pipe: Any) -> dict[str, torch.Tensor]:
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    return {f"{name}.{key}": value.clone() for name, part in parts.items() for key, value in part.state_dict().items()}


def output(case: Case, pipe: Any, call: Callable[..., Any], **changes: Any) -> np.ndarray:
    with seeded():
        result = call(**{**case.inputs(pipe), **changes})
    return as_array(getattr(result, case.output) if hasattr(result, case.output) else result[0])


def difference(seen: np.ndarray, wanted: np.ndarray) -> float:
    assert seen.shape == wanted.shape
    return float(np.abs(seen - wanted).mean()) / (float(np.ptp(wanted)) or 1.0)


@pytest.mark.parametrize("name", NAMES)
def test_every_family_is_planned_run_and_undone(name: str) -> None:
    case = FAMILIES[name]
    pipe = case.build()
    wanted, before = case.run(pipe), bits(pipe)
    verify = sorted(FAMILIES).index(name) % 2 == 0
    plan = autoplan(pipe, inputs=case.inputs(pipe), device="cpu", calibrate="never", verify=verify, fix=UNCOMPILED)
    assert plan.predicted.fits
    assert (plan.measured is not None) == verify
    under = output(case, pipe, lambda **inputs: plan.run(pipe, **inputs))
    plain = output(case, pipe, pipe)
    plan.undo(pipe)
    assert difference(under, wanted) <= TOLERANCE
    assert np.array_equal(under, plain)
    after = bits(pipe)
    assert after.keys() == before.keys()
    assert all(after[key].dtype == before[key].dtype and torch.equal(after[key], before[key]) for key in before)
    assert np.array_equal(case.run(pipe), wanted)


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_a_split_batch_gives_what_separate_calls_give_whatever_the_output(name: str) -> None:
    case = FAMILIES[name]
    pipe = case.build()
    prompts = ["a cat", "a dog", "a hat", "a mat"]

    def call(run: Callable[..., Any], **changes: Any) -> Any:
        generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
        return run(**{**case.inputs(pipe), "prompt": prompts, "generator": generators, **changes})

    wanted = {kind: call(pipe, output_type=kind).images for kind in ("np", "pt", "pil", "latent")}
    fixed = {**UNCOMPILED, "batch_split": 2, "dtype": "fp32", "channels_last": False}
    plan = autoplan(pipe, batch_size=4, inputs={**case.inputs(pipe), "prompt": prompts}, device="cpu", calibrate="never", fix=fixed)
    calls: list[int] = []

    def run(**inputs: Any) -> Any:
        return plan.run(pipe, **inputs)

    for kind, images in wanted.items():
        seen = call(run, output_type=kind).images
        assert type(seen) is type(images)
        assert difference(as_array(seen), as_array(images)) < 1e-3
    assert difference(as_array(call(run, return_dict=False)[0]), as_array(wanted["np"])) < 1e-3
    call(run, callback_on_step_end=lambda pipe, step, time, tensors: calls.append(step) or {})
    assert calls == [0, 1] * 2
    plan.undo(pipe)


def test_a_count_of_images_is_divided_and_lists_of_generators_with_it() -> None:
    case = FAMILIES["sd15"]
    pipe = case.build()
    inputs = {**case.inputs(pipe), "num_images_per_prompt": 4}

    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in range(4)]

    wanted = pipe(**inputs | {"generator": generators()}).images
    plan = autoplan(pipe, batch_size=4, inputs=inputs, device="cpu", calibrate="never", verify=False,
                    fix={**UNCOMPILED, "batch_split": 4, "dtype": "fp32", "channels_last": False})  # fmt: skip
    seen = plan.run(pipe, **inputs | {"generator": generators()}).images
    plan.undo(pipe)
    assert difference(seen, wanted) < 1e-3


def test_a_list_of_generators_is_checked_with_as_many() -> None:
    """Some pipelines refuse one generator for several samples."""
    case = FAMILIES["sd15"]
    pipe = case.build()

    class Strict(type(pipe)):
        @wraps(type(pipe).__call__)
        def __call__(self, prompt: Any, generator: Any = None, **others: Any) -> Any:
            if generator is not None and (not isinstance(generator, list) or len({id(item) for item in generator}) != len(prompt)):
                raise ValueError("one generator per sample")
            return super().__call__(prompt, generator=generator, **others)

    pipe.__class__ = Strict
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    inputs = {**case.inputs(pipe), "prompt": ["a", "b", "c", "d"], "generator": generators}
    before = [generator.get_state() for generator in generators]
    plan = autoplan(pipe, batch_size=4, inputs=inputs, device="cpu", calibrate="never", fix={**UNCOMPILED, "batch_split": 2})
    assert plan.measured is not None
    assert all(torch.equal(generator.get_state(), state) for generator, state in zip(generators, before, strict=True))
    plan.undo(pipe)
    del inputs["generator"]
    plan = autoplan(pipe, batch_size=4, inputs=inputs, device="cpu", calibrate="never", fix=UNCOMPILED)
    assert plan.measured is not None
    plan.undo(pipe)


def test_a_pipeline_that_writes_into_the_prompts_it_is_given_can_be_called_again() -> None:
    case = FAMILIES["sd15"]
    pipe = case.build()

    class Writes(type(pipe)):
        @wraps(type(pipe).__call__)
        def __call__(self, prompt: Any, **others: Any) -> Any:
            for number, text in enumerate(prompt):
                prompt[number] = "a picture of " + text
            result = super().__call__(list(prompt), **others)
            prompt[:] = [[text] for text in prompt]
            return result

    pipe.__class__ = Writes
    inputs = {**case.inputs(pipe), "prompt": ["a", "b"]}
    plan = autoplan(pipe, batch_size=2, inputs=inputs, device="cpu", calibrate="never", fix=UNCOMPILED)
    assert plan.measured is not None
    assert inputs["prompt"] == ["a", "b"]
    plan.run(pipe, **inputs)
    plan.undo(pipe)


def test_explain_of_a_live_pipeline_without_any_inputs() -> None:
    plan = explain(FAMILIES["sd15"].build(), batch_size=2, height=32, width=32, num_inference_steps=3, calibrate="never")
    assert plan.workload.batch_size == 2
    assert plan.predicted.fits
    labelled = explain(FAMILIES["dit"].build(), batch_size=3, num_inference_steps=2, calibrate="never")
    assert labelled.workload.batch_size == 3


def test_a_dtype_that_the_pipelines_code_refuses_is_ruled_out_with_its_words() -> None:
    """Interpolating in bfloat16 has no CPU kernel that unCLIP's padding needs; numpy has no bfloat16 for DDPM's pictures."""
    for name in ("ddpm", "unclip"):
        case = FAMILIES[name]
        pipe = case.build()
        plan = autoplan(pipe, inputs=case.inputs(pipe), device="cpu", calibrate="never", apply=False, fix=UNCOMPILED)
        assert plan.settings["dtype"] == "fp32"
        assert any("bfloat16" in item.reason.lower() and item.settings.get("dtype") == "bf16" for item in plan.rejected)


@pytest.mark.parametrize("verify", [True, False])
def test_a_plan_that_does_not_take_is_replaced_by_one_that_does(monkeypatch: pytest.MonkeyPatch, verify: bool) -> None:
    kind = type(knob("channels_last"))
    really = kind.apply

    def fail(self: Any, site: Any, value: Any) -> Any:
        if value:
            raise RuntimeError("no such layout")
        return really(self, site, value)

    monkeypatch.setattr(kind, "apply", fail)
    case = FAMILIES["sd15"]
    pipe = case.build()
    wanted = case.run(pipe)
    plan = autoplan(pipe, inputs=case.inputs(pipe), device="cpu", calibrate="never", verify=verify, fix={**UNCOMPILED, "dtype": "fp32"})
    assert plan.settings["channels_last"] is False
    assert verify is False or plan.measured is not None
    assert np.array_equal(case.run(pipe), wanted)
    plan.undo(pipe)


def test_equal_frames_of_a_tiled_video_are_traced_once_with_all_their_work() -> None:
    """A video decoder keeps a cache of frames in a list that it is given; 4 times as many frames are no more rows."""
    case = FAMILIES["wan21_t2v"]
    pipe = case.build()
    found = []
    for frames in (13, 37):
        run = DryRun(pipe, Workload(num_frames=frames), {**case.inputs(pipe), "num_frames": frames})
        trace = run.trace(None, None, (VaeMode(False, 0),))
        index = next(index for index, call in enumerate(trace.calls) if call.name == "vae.decode")
        found.append((trace.calls[index], trace.variants[index, "tile"]))
    (short, short_tiled), (long, long_tiled) = found
    assert len(long_tiled) < 1.1 * len(short_tiled)
    assert len(long) > 2 * len(short)
    assert long_tiled.total_flops == pytest.approx(long.total_flops, rel=0.02)
    assert short_tiled.total_flops == pytest.approx(short.total_flops, rel=0.02)


def test_two_prompts_times_two_images_are_cut_by_prompt_so_that_the_order_stays() -> None:
    inputs = {"prompt": ["a", "b"], "num_images_per_prompt": 2, "generator": [1, 2, 3, 4], "original_size": (8, 8), "sigmas": [1.0, 0.5]}
    first, second = share(inputs, 2)
    assert first == {**inputs, "prompt": ["a"], "generator": [1, 2]}
    assert second == {**inputs, "prompt": ["b"], "generator": [3, 4]}
    assert [(piece["prompt"], piece["num_images_per_prompt"], piece["generator"]) for piece in share(inputs, 4)] == [
        (["a"], 1, [1]), (["a"], 1, [2]), (["b"], 1, [3]), (["b"], 1, [4])]  # fmt: skip
    with pytest.raises(UsageError, match="3 samples times 2"):
        share({"prompt": ["a", "b", "c"], "num_images_per_prompt": 2}, 2)


def test_rows_inside_a_list_or_a_mapping_are_not_split() -> None:
    """An image embedding per adapter, each with one row per sample: which of them goes to whom is the pipeline's business."""
    two = {"prompt": ["a", "b"], "height": 8}
    for inside in ([torch.zeros(4, 8)], {"scale": torch.zeros(2, 8)}, [["x", "y"]]):
        with pytest.raises(UsageError, match="'extra' holds one row per sample"):
            share({**two, "extra": inside}, 2)
    assert share({**two, "extra": [torch.zeros(3, 8)]}, 2)[0]["prompt"] == ["a"]
    assert share({"prompt": "a", "num_images_per_prompt": 2, "extra": [torch.zeros(2, 8)]}, 2)[1]["num_images_per_prompt"] == 1


def test_the_batch_is_what_labels_embeddings_or_pictures_say_where_there_is_no_prompt() -> None:
    labels = FAMILIES["dit"]
    pipe = labels.build()
    plan = autoplan(pipe, batch_size=2, inputs=labels.inputs(pipe), device="cpu", calibrate="never", verify=False, fix=UNCOMPILED)
    assert plan.workload.batch_size == 2
    assert plan.settings["batch_split"] == 1
    plan.undo(pipe)
    assert [piece["class_labels"] for piece in share({"class_labels": [1, 2], "batch_size": 2}, 2)] == [[1], [2]]
    assert share({"image_embeds": torch.zeros(4, 8), "height": 4}, 2)[1]["image_embeds"].shape == (2, 8)
    assert samples_in({"image": torch.zeros(3, 16, 16)}) is None
    assert samples_in({"image": torch.zeros(2, 3, 16, 16)}) == 2
    assert samples_in({"task_prompt": "a", "image": [["one row"], ["another"]]}) == 1
    features = {"padding_mask": torch.ones(2, 6, dtype=torch.bool), "features": {"sequence": torch.zeros(2, 6)}, "times": torch.zeros(3)}
    assert samples_in(features) == 2
    assert samples_in({**features, "coordinates": torch.zeros(1, 6, 3)}) is None
    assert batch_argument_of(["padding_mask", "num_designs_per_prompt"]) == "num_designs_per_prompt"
    assert batch_argument_of(["image", "batch_size"]) is None  # Marigold's: how many pictures its UNet takes at once
    assert batch_argument_of(["batch_size", "class_labels"]) == "batch_size"


def test_a_batch_that_only_the_workload_names_can_be_split() -> None:
    pipe = FAMILIES["sd15"].build()
    inputs = {"prompt": "a", "height": 32, "width": 32, "num_inference_steps": 2}
    fixed = {**UNCOMPILED, "batch_split": 4}
    plan = autoplan(pipe, batch_size=4, inputs=inputs, device="cpu", calibrate="never", apply=False, fix=fixed)
    assert plan.settings["batch_split"] == 4
