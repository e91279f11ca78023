"""Plans whose tensors would fit, but not around the holes they leave in torch's memory, are passed over."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest

import planner
from planner.autoplan import Request, _model
from planner.cost import reserved
from planner.cost.allocator import Script
from planner.cost.model import CostModel
from planner.cost.reserved import Reserved, expandable_segments, lacking_bytes, replayed
from planner.decide import _search
from planner.errors import NoFeasiblePlan
from planner.models import resolve
from planner.recipe import Recipe
from planner.targets import target_for
from planner.types import Device

SDXL, SIZES = "stable-diffusion-xl", {"batch_size": 4, "num_inference_steps": 4}
UNCOMPILED = {"compile": "none"}


def model_on(device: Device) -> CostModel:
    return _model(resolve(SDXL), device, "never", None, SIZES)[0]


@pytest.fixture(scope="module")
def card() -> Device:
    return target_for("RTX 4090", None, None)


def test_the_chosen_plan_runs_where_a_faster_one_would_lack_unbroken_memory(card: Device) -> None:
    """SDXL's decoder at batch 4 in float32 leaves holes of gigabytes: its tensors alone need less than the budget."""
    model = model_on(card)
    space, chosen = _search(model.traces, model, Request(fix={**UNCOMPILED, "dtype": "fp16", "vae_tiling": False}), {})
    assert chosen is not None
    assert chosen.fits(space.limits)
    assert not lacking_bytes(model, space.recipe(chosen.settings))
    limits = replace(space.limits, bytes=space.budget_bytes)
    passed_over = space.solver.best(limits, {"vae_slicing": False, "offload": "none"})
    assert passed_over is not None
    assert passed_over.needed_bytes <= card.budget_bytes
    lacking = space.lacking_bytes(passed_over)
    assert lacking > 1 << 30
    room = card.model_copy(update={"budget_bytes": card.budget_bytes + lacking})
    enough = model_on(room)
    assert lacking_bytes(enough, space.recipe(passed_over.settings)) == 0


def test_an_estimate_says_that_such_a_plan_does_not_fit(card: Device) -> None:
    found = planner.estimate(SDXL, "RTX 4090", {"dtype": "fp16"}, calibrate="never", **SIZES)
    assert found.peak_allocated_bytes < card.budget_bytes
    assert not found.fits


def test_segments_that_grow_leave_no_holes(card: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    here = model_on(card.model_copy(update={"free_bytes": card.total_bytes}))
    space, _ = _search(here.traces, here, Request(fix=UNCOMPILED), {})
    plain = {axis.name: axis.values[0] for axis in space.problem.axes}
    assert lacking_bytes(here, space.recipe(plain)) > 0
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:512, expandable_segments:True")
    assert expandable_segments()
    assert lacking_bytes(here, space.recipe(plain)) == 0
    elsewhere = model_on(card)
    assert lacking_bytes(elsewhere, space.recipe(plain)) > 0


def test_a_replay_that_lacks_nothing_stays_within_the_card(card: Device) -> None:
    model = model_on(card)
    space, chosen = _search(model.traces, model, Request(fix=UNCOMPILED), {})
    assert chosen is not None
    recipe = space.recipe(chosen.settings)
    limit = card.budget_bytes + card.headroom_bytes
    assert replayed(model, recipe, model.cost(recipe), limit).peak_bytes <= limit <= card.total_bytes


class _Forgetful(set[object]):
    """Takes nothing in."""

    def add(self, _: object) -> None:
        pass


def test_passes_left_out_would_have_changed_nothing(card: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    def found(limit_bytes: int | None) -> tuple[Reserved, int]:
        played = []
        monkeypatch.setattr(Script, "play", lambda script, allocator: (played.append(script), play(script, allocator)))
        return replayed(model_on(card), recipe, cost, limit_bytes), len(played)

    play, model = Script.play, model_on(card)
    recipe = Recipe(dtype="fp16", vae_slicing=True)
    cost = model.cost(recipe)
    limits = None, card.budget_bytes, cost.peak_bytes
    short = [found(limit) for limit in limits]
    monkeypatch.setattr(reserved, "_Run", functools.partial(reserved._Run, _idle=_Forgetful()))
    whole = [found(limit) for limit in limits]
    assert [result for result, _ in short] == [result for result, _ in whole]
    assert sum(passes for _, passes in short) < sum(passes for _, passes in whole)


def test_a_limit_that_is_not_reached_is_replayed_once(card: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    model, runs, real = model_on(card), [], reserved._Run
    monkeypatch.setattr(reserved, "_Run", lambda *args: (runs.append(args), real(*args))[1])
    recipe = Recipe(dtype="fp16", vae_slicing=True)
    cost = model.cost(recipe)
    assert replayed(model, recipe, cost, card.total_bytes) == replayed(model, recipe, cost)
    assert len(runs) == 1
    assert replayed(model, recipe, cost, cost.peak_bytes).limited
    assert len(runs) == 2


def test_when_only_holes_are_in_the_way_the_error_says_so() -> None:
    fixed = {**UNCOMPILED, "dtype": "fp16", "vae_tiling": False, "vae_slicing": False, "offload": "none", "batch_split": 1,
             "channels_last": False, "attention": "sdpa", "fuse_qkv": False, "quantization": "none"}  # fmt: skip
    with pytest.raises(NoFeasiblePlan, match="more for the holes between its blocks") as caught:
        planner.explain(SDXL, "RTX 4090", fix=fixed, calibrate="never", **SIZES)
    assert caught.value.shortfall_bytes
