"""The whole life cycle on this machine's CPU: plan, apply, check, generate, compare, take back; then again with less memory.

The pipeline is a real StableDiffusionPipeline (text encoder, UNet, VAE, scheduler) with random weights, small enough for a
CPU. Nothing is downloaded. Run: python examples/closed_loop.py
"""

from __future__ import annotations

import sys
import time

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import logging
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from planner import Plan, autoplan
from planner.explain.words import plan_line
from planner.measure import measure_call
from planner.units import MIB, format_bytes, format_seconds

BATCH, SIDE, STEPS = 4, 256, 4
PROMPT = "a small boat on a wide river"
INPUTS = {"height": SIDE, "width": SIDE, "num_inference_steps": STEPS, "output_type": "np"}
FIXED = {"dtype": "fp32", "compile": "none"}
"""Random weights mean nothing, so neither does their precision; and compiling takes longer than the demo."""


def small_pipeline() -> StableDiffusionPipeline:
    """About 60 million random weights; the VAE decodes 256x256 images, the largest phase by far."""
    torch.manual_seed(0)
    letters = [letter + end for letter in "abcdefghijklmnopqrstuvwxyz" for end in ("", "</w>")]
    words = {word: index for index, word in enumerate(("<|startoftext|>", "<|endoftext|>", *letters))}
    tokenizer = CLIPTokenizer(vocab=words, merges=[], model_max_length=77)
    config = CLIPTextConfig(vocab_size=len(words), bos_token_id=0, eos_token_id=1, pad_token_id=1, hidden_size=256,
                            intermediate_size=1024, num_attention_heads=4, num_hidden_layers=4)  # fmt: skip
    text = CLIPTextModel(config)
    unet = UNet2DConditionModel(
        sample_size=SIDE // 8, block_out_channels=(96, 192, 384), layers_per_block=1, cross_attention_dim=256, attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"))  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(32, 64, 128, 128), down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4, sample_size=128, layers_per_block=1)  # fmt: skip
    pipe = StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def life_cycle(pipe: StableDiffusionPipeline, memory_budget: str | None) -> Plan:
    """Plan within the budget, generate under the plan, print predicted beside measured, take the plan back."""
    inputs = INPUTS | {"prompt": PROMPT}
    started = time.perf_counter()
    plan = autoplan(pipe, batch_size=BATCH, inputs=inputs, device="cpu", memory_budget=memory_budget, fix=FIXED)
    took = time.perf_counter() - started
    budget = format_bytes(plan.device.budget_bytes)
    print(f"\nbudget {budget}: {plan_line(plan)}   (detected, traced, probed, searched, applied, checked in {took:.1f} s)")
    output, seen = measure_call(pipe, lambda: plan.run(pipe, **inputs), torch.device("cpu"))
    print(f"  {len(output.images)} images of {output.images.shape[1]}x{output.images.shape[2]} generated under the plan")
    print(f"  {'':16}{'predicted':>14}{'measured':>14}{'ratio':>8}")
    report("peak memory", plan.predicted.peak_allocated_bytes, seen.peak_allocated_bytes, format_bytes)
    report("call latency", plan.predicted.latency_seconds, seen.latency_seconds, format_seconds)
    if seen.peak_allocated_bytes is not None and plan.device.budget_bytes is not None:
        verdict = "inside" if seen.peak_allocated_bytes <= plan.device.budget_bytes else "ABOVE"
        print(f"  measured peak is {verdict} the budget")
    plan.undo(pipe)
    return plan


def report(name: str, predicted: float, measured: float | None, text: object) -> None:
    """One line: predicted, measured, and their ratio."""
    shown = text  # a formatter from planner.units
    ratio = f"{predicted / measured:8.2f}" if measured else ""
    print(f"  {name:16}{shown(predicted):>14}{shown(measured):>14}{ratio}")  # type: ignore[operator]


def tighter_budget(pipe: StableDiffusionPipeline, roomy: Plan) -> str:
    """Half way between what the plan without a limit needs and the least that any plan needs."""
    inputs = INPUTS | {"prompt": PROMPT}
    leanest = autoplan(pipe, batch_size=BATCH, inputs=inputs, device="cpu", objective="memory", fix=FIXED, calibrate="never", apply=False)
    middle = (roomy.predicted.peak_allocated_bytes + leanest.predicted.peak_allocated_bytes) // 2
    return f"{middle // MIB}MiB"


def main() -> int:
    logging.set_verbosity_error()
    pipe = small_pipeline()
    roomy = life_cycle(pipe, None)
    plan = life_cycle(pipe, tighter_budget(pipe, roomy))
    if plan.settings == roomy.settings:
        print("the tighter budget did not change the plan", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
