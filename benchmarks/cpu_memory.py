"""Predicted against measured peaks of real pipelines on this CPU: ``python -m benchmarks.cpu_memory [FAMILY ...]``.

Measured are the CPU allocator's own events (``planner.measure.cpu_peak_bytes``), above the weights that are there already.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from planner.cost.coefficients import default_coefficients
from planner.cost.model import CostModel
from planner.dryrun.provider import Traces
from planner.hardware.detect import detect_device
from planner.measure import cpu_peak_bytes
from planner.models import resolve
from planner.recipe import Recipe
from planner.types import Workload
from tests.zoo import FAMILIES

FAMILY_NAMES = ("sd15", "sdxl", "sd3", "flux", "pixart_sigma")
BATCHES, SIDES = (1, 2, 4), (64, 128)
RECIPES = {"plain": Recipe(), "vae_slicing": Recipe(vae_slicing=True)}


def measured_and_predicted(family: str, batch: int, side: int, name: str) -> tuple[int, int]:
    """Bytes above the weights: what the allocator saw, and what the cost model says."""
    case, recipe = FAMILIES[family], RECIPES[name]
    pipe = case.build()
    inputs = {**case.inputs(pipe), "height": side, "width": side, "num_images_per_prompt": batch}
    device = detect_device("cpu")
    model = CostModel(Traces.of(resolve(pipe), Workload(), inputs), device, default_coefficients(device), batch)
    cost = model.cost(recipe)
    if recipe.vae_slicing:
        pipe.vae.enable_slicing()
    with torch.no_grad():
        found = cpu_peak_bytes(lambda: _run(pipe, inputs))
    return found, cost.peak_bytes - cost.residency.rest_bytes


def _run(pipe: Any, inputs: dict[str, Any]) -> None:
    pipe(**inputs, **({} if "generator" in inputs else {"generator": torch.Generator().manual_seed(0)}))


def lines(families: Sequence[str]) -> Iterator[str]:
    """One line per pipeline, batch, size and knob."""
    for family in families:
        for batch in BATCHES:
            for side in SIDES:
                for name in RECIPES:
                    found, said = measured_and_predicted(family, batch, side, name)
                    yield f"{family:14}{batch:3}{side:5} {name:12}{found:12}{said:12}{said / found - 1:+8.1%}"


if __name__ == "__main__":
    for line in lines(sys.argv[1:] or FAMILY_NAMES):
        sys.stdout.write(line + "\n")
