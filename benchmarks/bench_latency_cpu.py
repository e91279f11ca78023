"""Predicted against measured latency of real pipelines on this CPU: probes of operations, summed by the cost model.

    python benchmarks/bench_latency_cpu.py [--rounds 5] [--only sd flux] [--out results.json]

Each row is one pipeline call in one dtype, memory format, attention and batch. Everything is predicted first; then all rows
are measured in turn, round after round, so that a slow minute of the machine hits all of them. One thread: the clock is then
the time this thread was running, which other programs do not change (``--wall`` shows elapsed time). Nothing is fitted to the rows.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("PLANNER_CACHE_DIR", tempfile.mkdtemp(prefix="planner-bench-"))
warnings.filterwarnings("ignore")

import diffusers as df  # noqa: E402
import torch  # noqa: E402

from planner.calibrate import calibrate, cpu_device_measured, in_variant, probe_missing  # noqa: E402
from planner.cost.model import CostModel  # noqa: E402
from planner.dryrun.inputs import call_arguments, complete_workload  # noqa: E402
from planner.dryrun.provider import Traces  # noqa: E402
from planner.models import resolve  # noqa: E402
from planner.recipe import Recipe  # noqa: E402
from planner.types import Workload  # noqa: E402
from tests.zoo import image_dit, image_unet, parts  # noqa: E402
from tests.zoo.case import seeded  # noqa: E402
from tests.zoo.text import WIDTH  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def sd() -> Any:
    unet = parts.unet(block_out_channels=(64, 128), layers_per_block=2, sample_size=32, attention_head_dim=8)
    return df.StableDiffusionPipeline(**image_unet.sd_parts(unet=unet))


def sdxl() -> Any:
    unet = parts.xl_unet(block_out_channels=(64, 128), layers_per_block=2, sample_size=32)
    return df.StableDiffusionXLPipeline(**image_unet.xl_parts(unet=unet))


def controlnet() -> Any:
    sizes = {"block_out_channels": (64, 128), "attention_head_dim": 8}
    return df.StableDiffusionControlNetPipeline(**image_unet.sd_parts(unet=parts.unet(**sizes), controlnet=parts.controlnet(**sizes)))


def big_vae() -> Any:
    vae = parts.vae(block_out_channels=(64, 128), layers_per_block=2)
    return df.StableDiffusionPipeline(**image_unet.sd_parts(vae=vae))


def flux() -> Any:
    transformer = df.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=3, num_single_layers=4, attention_head_dim=64, num_attention_heads=6,
        joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, axes_dims_rope=(16, 24, 24), guidance_embeds=True)  # fmt: skip
    return df.FluxPipeline(**image_dit.flux_parts(transformer=transformer))


def sd3() -> Any:
    pipe = image_dit.sd3()
    transformer = df.SD3Transformer2DModel(
        sample_size=32, patch_size=2, in_channels=4, num_layers=6, attention_head_dim=64, num_attention_heads=6,
        joint_attention_dim=2 * WIDTH, caption_projection_dim=384, pooled_projection_dim=2 * WIDTH, out_channels=4)  # fmt: skip
    pipe.register_modules(transformer=transformer)
    return pipe


def pixart() -> Any:
    sizes = {"num_layers": 6, "attention_head_dim": 48, "num_attention_heads": 8, "cross_attention_dim": 384, "sample_size": 32}
    return df.PixArtAlphaPipeline(**image_dit.pixart_parts(**sizes))


def pixels() -> Any:
    unet = df.UNet2DModel(sample_size=32, block_out_channels=(64, 128, 128), layers_per_block=2, norm_num_groups=8,
                          down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
                          up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"))  # fmt: skip
    return df.DDIMPipeline(unet=unet, scheduler=df.DDIMScheduler())


def tiny_sd() -> Any:
    return image_unet.sd15()


TEXT = {"prompt": "a small cat on a red mat", "num_inference_steps": 4, "output_type": "np"}
LARGE, SMALL = {"height": 64, "width": 64}, {"height": 32, "width": 32}
PIPELINES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "sd": (sd, TEXT | LARGE),
    "sdxl": (sdxl, TEXT | LARGE),
    "controlnet": (controlnet, TEXT | SMALL | {"image": parts.picture(32, 32)}),
    "big_vae": (big_vae, TEXT | LARGE | {"height": 128, "width": 128, "num_inference_steps": 1}),
    "flux": (flux, TEXT | LARGE | {"max_sequence_length": 48}),
    "sd3": (sd3, TEXT | LARGE | {"max_sequence_length": 48}),
    "pixart": (pixart, TEXT | LARGE | {"max_sequence_length": 48, "use_resolution_binning": False}),
    "pixels": (pixels, {"num_inference_steps": 4, "output_type": "np"}),
    "tiny_sd": (tiny_sd, TEXT | SMALL),
}
CONVOLUTIONAL = {"sd", "sdxl", "controlnet", "big_vae", "pixels", "tiny_sd"}
VANILLA = {"sd", "controlnet"}
SINGLE_ONLY = {"pixels"}
"""Their own code turns the result to numpy as it is, which has no bf16."""


@dataclass
class Row:
    """One call to predict and to measure."""

    pipeline: str
    dtype: str
    memory_format: str
    attention: str
    batch: int
    predicted: float = 0.0
    measured: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    run: Any = None

    @property
    def seconds(self) -> float:
        return statistics.median(self.measured)

    @property
    def error(self) -> float:
        return self.predicted / self.seconds - 1

    def summary(self) -> dict[str, Any]:
        known = {key: value for key, value in asdict(self).items() if key != "run"} if self.run is None else None
        return known or {key: getattr(self, key) for key in ("pipeline", "dtype", "memory_format", "attention", "batch", "predicted",
                                                             "measured", "wall", "error")}  # fmt: skip


def rows_for(name: str) -> list[Row]:
    """The combinations measured of one pipeline."""
    rows = [Row(name, "fp32", "nchw", "sdpa", 1), Row(name, "fp32", "nchw", "sdpa", 2), Row(name, "bf16", "nchw", "sdpa", 1)]
    if name in CONVOLUTIONAL:
        rows += [Row(name, "fp32", "nhwc", "sdpa", 1), Row(name, "bf16", "nhwc", "sdpa", 2)]
    if name in VANILLA:
        rows.append(Row(name, "fp32", "nchw", "vanilla", 1))
    return [row for row in rows if row.dtype == "fp32" or name not in SINGLE_ONLY]


def prepare(row: Row, device: Any, calibration: Any) -> None:
    """Build the pipeline, predict its call from probes, and leave it ready to be measured."""
    make, inputs = PIPELINES[row.pipeline]
    with seeded():
        pipe = make()
    pipe.set_progress_bar_config(disable=True)
    pipe.to(dtype=DTYPES[row.dtype])
    workload = complete_workload(pipe, Workload(batch_size=row.batch), inputs)
    traces = Traces.of(resolve(pipe), workload, inputs)
    trace = traces.trace()
    calls = [(call, trace.count(index)) for index, call in enumerate(trace.calls)]
    variant: Any = "channels_last" if row.memory_format == "nhwc" else "vanilla" if row.attention == "vanilla" else ""
    plain = probe_missing(calls, device, calibration, 60.0)
    probes = dict(plain)
    if variant:
        other_way = probe_missing(calls, device, calibration, 60.0, variants=(variant,))
        for call, _ in calls:
            if call.component in ("unet", "vae", "controlnet") and not (variant == "vanilla" and call.component == "vae"):
                probes |= in_variant({**plain, **other_way}, call, variant)
    recipe = Recipe(channels_last=row.memory_format == "nhwc", attention="vanilla" if row.attention == "vanilla" else "default")
    row.predicted = CostModel(traces, device, calibration.coefficients, row.batch, probes).cost(recipe).seconds
    put_in_force(pipe, row)
    arguments = call_arguments(pipe, workload, inputs, False)
    row.run = lambda: pipe(**arguments)


def put_in_force(pipe: Any, row: Row) -> None:
    """The row's memory format and attention on the live pipeline."""
    for name in ("unet", "vae", "controlnet"):
        module = getattr(pipe, name, None)
        if module is None:
            continue
        module.eval()
        if row.memory_format == "nhwc":
            module.to(memory_format=torch.channels_last)
        if row.attention == "vanilla" and name != "vae":
            module.set_attn_processor(df.models.attention_processor.AttnProcessor())


def measure(rows: list[Row], rounds: int) -> None:
    """All rows in turn, round after round; the first round warms up."""
    for turn in range(rounds + 1):
        for row in rows:
            wall, own = time.perf_counter(), time.thread_time()
            row.run()
            if turn:
                row.measured.append(time.thread_time() - own)
                row.wall.append(time.perf_counter() - wall)
        print(f"round {turn} of {rounds}", file=sys.stderr, flush=True)


def report(rows: list[Row], wall: bool) -> None:
    print(f"{'pipeline':12s}{'dtype':6s}{'format':8s}{'attention':11s}{'batch':>5s}{'predicted ms':>14s}{'measured ms':>13s}{'error':>9s}")
    for row in rows:
        elapsed = f"   wall {1e3 * statistics.median(row.wall):.1f}" if wall else ""
        print(f"{row.pipeline:12s}{row.dtype:6s}{row.memory_format:8s}{row.attention:11s}{row.batch:5d}{1e3 * row.predicted:14.1f}"
              f"{1e3 * row.seconds:13.1f}{row.error:+9.1%}{elapsed}")  # fmt: skip
    errors = [abs(row.error) for row in rows]
    signed = statistics.median(row.error for row in rows)
    within = sum(error <= 0.1 for error in errors)
    print(f"{len(rows)} rows, {len({row.pipeline for row in rows})} pipelines: median absolute error {statistics.median(errors):.1%}, "
          f"median {signed:+.1%}, largest {max(errors):.1%}, within 10 %: {within}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", choices=sorted(PIPELINES), default=sorted(PIPELINES))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--wall", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    device = cpu_device_measured()
    calibration = calibrate(device, True)
    rows = [row for name in given.only for row in rows_for(name)]
    for row in rows:
        prepare(row, device, calibration)
    measure(rows, given.rounds)
    print(f"{device.name}, 1 thread; torch {torch.__version__}, diffusers {df.__version__}, Python {platform.python_version()}")
    report(rows, given.wall)
    if given.out:
        given.out.write_text(json.dumps([row.summary() for row in rows], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
