"""What a family of the zoo is: a name, how its pipeline is built, and a realistic call of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch

from planner.noise import one_noise_for_all_dtypes

SEED = 0
PROMPT = "a small cat on a red mat"
Inputs = Mapping[str, Any] | Callable[[], Mapping[str, Any]]


@contextmanager
def seeded(seed: int = SEED) -> Iterator[None]:
    """Run the block from one CPU seed, the noise the same in every dtype, and put the caller's random state back afterwards."""
    with torch.random.fork_rng(devices=[]), one_noise_for_all_dtypes():
        torch.manual_seed(seed)
        yield


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One family: `build()` gives a fresh pipeline with the same random weights each time, `inputs()` its call."""

    name: str
    kind: str
    make: Callable[[], Any]
    arguments: Inputs
    output: str = "images"
    slow: bool = False
    generator: bool = True
    attributes: Mapping[str, Any] = field(default_factory=dict)

    def build(self) -> Any:
        """A new pipeline on the CPU in float32, in eval mode, with the progress bar off."""
        # Without gradients: a graph left behind by old-style weight_norm would keep parameters from being moved.
        with seeded(), torch.no_grad():
            pipe = self.make()
        for component in pipe.components.values():
            if isinstance(component, torch.nn.Module):
                component.eval()
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def inputs(self, pipe: Any, seed: int = SEED) -> dict[str, Any]:
        """Keyword arguments of one call of `pipe`, with a fresh seeded CPU generator where the call takes one."""
        given = self.arguments() if callable(self.arguments) else self.arguments
        device = pipe._execution_device  # a tensor in a call is an earlier stage's answer, so it is where the pipe runs
        call = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in given.items()}
        if self.generator:
            call["generator"] = torch.Generator("cpu").manual_seed(seed)
        return call

    def run(self, pipe: Any, seed: int = SEED, **changes: Any) -> np.ndarray:
        """Call `pipe` and give its main output as one float array; the global random state is seeded and restored."""
        with seeded(seed):
            result = pipe(**{**self.inputs(pipe, seed), **changes})
        return as_array(getattr(result, self.output) if hasattr(result, self.output) else result[0])


def as_array(value: Any) -> np.ndarray:
    """Arrays, tensors, PIL images and (nested) lists of them, as one float64 array."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", torch.float64).numpy()
    if isinstance(value, list | tuple):
        return np.stack([as_array(item) for item in value])
    return np.asarray(value, dtype=np.float64)


FAMILIES: dict[str, Case] = {}


@cache
def prepared(family: str) -> tuple[Any, dict[str, Any], np.ndarray]:
    """A pipeline that has run once, its inputs without generator, and its output on the CPU; whoever changes it undoes that."""
    case = FAMILIES[family]
    pipe = case.build()
    case.run(pipe)
    inputs = case.inputs(pipe)
    inputs.pop("generator", None)
    return pipe, inputs, case.run(pipe)


def family(kind: str, arguments: Inputs, name: str | None = None, **options: Any) -> Callable[[Callable[[], Any]], Any]:
    """Register the decorated builder as a family under its own name, or under `name`."""

    def register(make: Callable[[], Any]) -> Callable[[], Any]:
        key = name or make.__name__
        if key in FAMILIES:
            raise ValueError(f"two families are called {key!r}")
        FAMILIES[key] = Case(name=key, kind=kind, make=make, arguments=arguments, **options)
        return make

    return register


def call(**arguments: Any) -> dict[str, Any]:
    """A call with the zoo's usual prompt and two steps; a value of `...` leaves the argument out."""
    usual = {"prompt": PROMPT, "num_inference_steps": 2, "output_type": "np"}
    return {key: value for key, value in {**usual, **arguments}.items() if value is not ...}


def image_call(**arguments: Any) -> dict[str, Any]:
    """`call` at 32 x 32 pixels."""
    return call(**{"height": 32, "width": 32, **arguments})
