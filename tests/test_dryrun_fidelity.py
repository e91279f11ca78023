"""The dry run against real CPU runs: the same calls, operations, FLOPs and bytes. What is measured is in ``measured.py``."""

import json
from collections import Counter
from functools import cache
from typing import Any

import pytest
import torch

from planner.dryrun.run import DryRun
from planner.dryrun.trace import CallTrace, PipelineTrace
from planner.types import Workload
from tests.measured import Call, measure, real_flops
from tests.zoo import FAMILIES

SAME = (
    "sd15", "sd15_img2img", "sd15_inpaint", "sd15_controlnet", "sdxl", "sdxl_refiner", "t2i_adapter", "instruct_pix2pix",
    "x4_upscaler", "sd3", "flux", "flux_kontext", "flux2", "pixart_sigma", "sana", "aura_flow", "lumina2", "cogview4",
    "hunyuan_dit", "dit", "deepfloyd_if", "unclip", "kandinsky22", "kandinsky22_combined", "cascade_combined",
    "wuerstchen_decoder", "audioldm", "stable_audio", "ddpm", "animatediff",
    "wan21_t2v", "wan22_t2v", "wan21_i2v", "cogvideox", "ltx_video", "mochi", "hunyuan_video", "latte",
)  # fmt: skip
"""Not here: Qwen-Image (keeps its frequencies in a plain attribute that a real CPU run need not copy, and a device must) and
Z-Image (makes a table in its first call only): their FLOPs are compared below, their bytes per call differ by that table."""
FLOPS_ONLY = ("qwen_image", "z_image", "chroma", "cogview3", "sdxl_controlnet", "lcm", "gligen", "allegro", "marigold_depth",
              "diffusion_gemma")  # fmt: skip
MOVES = {"clone", "copy_", "_to_copy", "contiguous", "scalar_tensor"}


def test_enough_families_are_compared() -> None:
    assert len(SAME) >= 15


@cache
def dry(name: str) -> PipelineTrace:
    """The dry run of one family."""
    case = FAMILIES[name]
    pipe = case.build()
    return DryRun(pipe, Workload(), case.inputs(pipe)).trace()


@cache
def runs(name: str) -> tuple[PipelineTrace, list[Call]]:
    """The dry run and a real run of one family."""
    case, trace = FAMILIES[name], dry(name)
    pipe = case.build()
    methods = {(call.component, call.method) for call in trace.calls if call.method != "forward"}
    with torch.random.fork_rng(devices=[]):
        return trace, measure(pipe, case.inputs(pipe), methods)


def worked(names: Counter[str]) -> Counter[str]:
    """Operations by name without moves; fused forms (``addmm``) split, for which one is taken depends on strides alone."""
    found: Counter[str] = Counter()
    for name, count in names.items():
        if name in ("addmm", "baddbmm"):
            found += Counter({"matmul": count, "add": count})
        elif name in ("mm", "bmm"):
            found["matmul"] += count
        elif name.startswith("_scaled_dot_product"):
            found["attention"] += count
        elif name not in MOVES:
            found[name] += count
    return found


def operations(call: CallTrace) -> Counter[str]:
    """Operation names of a traced call."""
    texts = (json.loads(call.shapes[index])[0] for index in call.columns["shape"])
    return Counter(text.split(".")[1] if "." in text else text for text in texts)


def pairs(name: str) -> list[tuple[Any, CallTrace, Call]]:
    trace, real = runs(name)
    return [(event, trace.calls[event.call], call) for event, call in zip(trace.events, real, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("name", SAME)
class TestAgainstARealRun:
    """Each family is run once for all of these."""

    def test_the_same_components_are_called_in_the_same_order(self, name: str) -> None:
        trace, real = runs(name)
        assert [trace.calls[event.call].name for event in trace.events] == [call.name for call in real]

    def test_every_operation_is_there_and_no_other(self, name: str) -> None:
        for _, traced, real in pairs(name):
            assert worked(operations(traced)) == worked(real.operations), traced.name

    def test_the_liveness_peak_is_the_real_peak(self, name: str) -> None:
        for _, traced, real in pairs(name):
            assert traced.live_peak_bytes == pytest.approx(real.peak_bytes, rel=0.01), traced.name

    def test_what_the_pipeline_holds_between_calls_is_what_it_really_holds(self, name: str) -> None:
        for event, traced, real in pairs(name):
            assert event.held_bytes == pytest.approx(real.held_bytes, rel=0.01), traced.name

    def test_fusing_never_needs_more_memory(self, name: str) -> None:
        trace, _ = runs(name)
        for call in trace.calls:
            assert (call.columns["fused_live_bytes"] <= call.columns["live_bytes"]).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", SAME + FLOPS_ONLY)
def test_flops_are_those_that_torch_counts(name: str) -> None:
    case, trace = FAMILIES[name], dry(name)
    pipe = case.build()
    with torch.random.fork_rng(devices=[]):
        expected = real_flops(pipe, case.inputs(pipe))
    assert sum(trace.calls[event.call].total_flops for event in trace.events) == expected
