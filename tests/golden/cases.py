"""Plans made by hand for the tests of explanations: every number is written here, none comes from the cost model."""

from __future__ import annotations

from typing import Any

from planner.plan import FrontierPoint, Plan, SearchCounts, WhatIf
from planner.types import Alternative, Device, Estimate, Measurement, Phase, Rejection, Term, Workload
from planner.units import GIB

BASELINE = {"attention": "sdpa", "batch_split": 1, "compile": "none", "dtype": "fp16", "offload": "none", "steps": 0,
            "vae_slicing": False, "vae_tiling": False}  # fmt: skip


def gib(value: float) -> int:
    return round(value * GIB)


def phase(name: str, calls: int, seconds: float, weights: float, activations: float, workspace: float, bound: str = "compute") -> Phase:
    sizes = [gib(value) for value in (weights, activations, workspace)]
    return Phase(name=name, component=name.split(".")[0], calls=calls, seconds=seconds, weights_bytes=sizes[0], activations_bytes=sizes[1],
                 workspace_bytes=sizes[2], peak_allocated_bytes=sum(sizes), bound=bound)  # fmt: skip


def estimate(peak: float, seconds: float, phases: tuple[Phase, ...] = (), *, fits: bool = True, host: float = 0.0, setup: float = 0.0,
             step: float | None = None, terms: tuple[Term, ...] = ()) -> Estimate:  # fmt: skip
    """``peak`` in GiB; intervals of 5 % (memory) and 30 % (time)."""
    fields: dict[str, Any] = {}
    for name, value in (("peak_allocated_bytes", gib(peak)), ("peak_reserved_bytes", gib(peak * 1.05)), ("host_bytes", gib(host)),
                        ("device_used_bytes", gib(peak * 1.05 + 0.5))):  # fmt: skip
        fields |= {name: value, f"{name}_low": round(value * 0.95), f"{name}_high": round(value * 1.05)}
    for name, number in (("latency_seconds", seconds), ("setup_seconds", setup), ("step_seconds", step)):
        ends = (None, None) if number is None else (number / 1.3, number * 1.3)
        fields |= {name: number, f"{name}_low": ends[0], f"{name}_high": ends[1]}
    return Estimate(fits=fits, phases=phases, terms=terms, basis="datasheet", **fields)


def alternative(settings: dict[str, Any], peak: float, seconds: float) -> Alternative:
    return Alternative(settings=BASELINE | settings, predicted=estimate(peak, seconds))


CARD = Device(
    name="NVIDIA GeForce RTX 3060", kind="cuda", architecture="Ampere", compute_capability=(8, 6),
    total_bytes=gib(12), budget_bytes=gib(11.2), flops_per_second={"fp16": 51e12}, bandwidth_bytes_per_second=360e9, basis="datasheet",
    note="'RTX 3060' is taken as NVIDIA GeForce RTX 3060 (12 GiB), its commonest variant; others: NVIDIA GeForce RTX 3060 8GB.",
)  # fmt: skip
CPU = Device(
    name="some CPU (cpu)", kind="cpu", architecture="x86_64", total_bytes=gib(16), free_bytes=gib(9), budget_bytes=gib(8),
    flops_per_second={"fp32": 2e11}, bandwidth_bytes_per_second=2.5e10, basis="measured",
)  # fmt: skip
TERMS = (
    Term(name="weights resident during vae.decode", bytes=gib(0.2), basis="datasheet", source="the model's configuration"),
    Term(name="activations of vae.decode", bytes=gib(7.0), basis="datasheet", source="lifetimes in the dry run"),
    Term(name="unet", seconds=100.0, basis="published", source="30 x 54 TFLOP, 1865 kernels"),
)


def offloaded() -> Plan:
    """A card too small for everything at once: model offload wins."""
    settings = BASELINE | {"offload": "model", "vae_slicing": True}
    phases = (
        phase("text_encoder", 2, 0.05, 0.23, 0.01, 0.0, "transfer"),
        phase("unet", 30, 100.0, 4.8, 1.1, 0.3),
        phase("vae.decode", 8, 11.5, 0.2, 7.0, 2.0, "memory"),
    )
    return Plan(
        model="stable-diffusion-xl", pipeline_class="StableDiffusionXLPipeline", digest="d" * 64, device=CARD,
        workload=Workload(batch_size=8, height=1024, width=1024, num_inference_steps=30), calls=100,
        settings=settings, baseline=BASELINE, predicted=estimate(9.2, 112.0, phases, host=6.5, setup=2.5, step=3.3, terms=TERMS),
        baseline_predicted=estimate(14.1, 109.0, fits=False),
        alternatives=(
            alternative({"offload": "model", "vae_slicing": True}, 9.2, 112.0),
            alternative({"offload": "model", "vae_tiling": True}, 7.1, 113.5),
            alternative({"offload": "sequential", "vae_slicing": True}, 4.0, 240.0),
            alternative({"batch_split": 2}, 10.9, 118.0),
        ),
        rejected=(
            Rejection(settings={"offload": "none"}, kind="memory", reason="needs 12.9 GiB", count=38, shortfall_bytes=gib(1.7),
                      phase="vae.decode"),
            Rejection(settings={"compile": "max-autotune", "offload": "model"}, kind="rule", reason="CUDA graphs need weights in one place",
                      count=4),
            Rejection(settings={"offload": "sequential"}, kind="dominated", reason="slower and no smaller", count=16),
        ),
        frontier=tuple(
            FrontierPoint(peak_allocated_bytes=gib(peak), latency_seconds=time, settings=BASELINE | {"offload": offload}, fits=peak < 11.2)
            for peak, time, offload in ((12.9, 109.0, "none"), (9.2, 112.0, "model"), (4.0, 240.0, "sequential"))
        ),
        candidates=(
            FrontierPoint(peak_allocated_bytes=gib(12.9), latency_seconds=109.0, settings={"offload": "none"}, fits=False),
            FrontierPoint(peak_allocated_bytes=gib(10.0), latency_seconds=150.0, settings={"attention": "sliced"}, fits=True),
        ),
        binding="memory: with 1.70 GiB more in vae.decode, the weights could stay on the device",
        what_if=WhatIf(extra_bytes=gib(1.7), settings=BASELINE | {"vae_slicing": True}, speedup=1.03),
        counts=SearchCounts(candidates=2304, evaluated=61),
        warnings=("nothing was measured on this device; run there: planner calibrate",),
        notes=("sizes as in the model's repository",),
    )  # fmt: skip


def untouched() -> Plan:
    """Nothing to change, and measured."""
    phases = (phase("unet", 4, 3.0, 0.5, 0.2, 0.0), phase("vae.decode", 1, 1.0, 0.5, 0.6, 0.0, "memory"))
    return Plan(
        model="StableDiffusionPipeline", pipeline_class="StableDiffusionPipeline", digest="e" * 64, workload=Workload(), device=CPU,
        quality="exact", settings=BASELINE, baseline=BASELINE, predicted=estimate(1.1, 4.0, phases, step=0.75),
        measured=Measurement(latency_seconds=4.4, step_seconds=0.8, peak_allocated_bytes=gib(1.0), output_finite=True),
    )  # fmt: skip


def crowded() -> Plan:
    """Many phases, long names, markup in names, several warnings, a split batch."""
    name = "component_{:02}.forward_with_a_long_name"
    phases = tuple(phase(name.format(place), place + 1, place / 2 + 0.1, 1.0, place / 10, 0.0) for place in range(12))
    long = "a warning that goes on for so long that no terminal shows it in one line, and so it has to be wrapped; run: planner doctor"
    return Plan(
        model='<img src=x onerror="alert(1)">', pipeline_class="AnyPipeline", digest="f" * 64,
        device=CARD.model_copy(update={"note": None}),
        workload=Workload(batch_size=6, height=512, width=768, num_frames=16, guidance_scale=3.5),
        objective="throughput",
        settings=BASELINE | {"batch_split": 3, "attention": "sliced"}, baseline=BASELINE, predicted=estimate(2.1, 39.0, phases),
        warnings=(long, "</script><b>another</b>"),
    )  # fmt: skip


CASES = {"offloaded": offloaded, "untouched": untouched, "crowded": crowded}
