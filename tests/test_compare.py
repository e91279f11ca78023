"""``planner compare``: many cards at a glance, with the very figures of ``planner explain``."""

from __future__ import annotations

import pytest

from planner import explain
from planner.autoplan import Glances
from planner.errors import ProfileError, UsageError
from planner.explain.compare import compare
from tests.zoo import FAMILIES

SMALL = {"height": 256, "width": 256, "steps": 4}


def test_a_table_has_the_plans_of_explain() -> None:
    cards = ("RTX 3060", "cpu")
    cells = compare(["stable-diffusion-v1-5"], cards, (1, 2), **SMALL)
    assert [(cell.gpu.removeprefix("NVIDIA "), cell.batch_size) for cell in cells][1] == ("GeForce RTX 3060", 2)
    assert len(cells) == len(cards) * 2
    for cell, (card, batch) in zip(cells, [(card, batch) for card in cards for batch in (1, 2)], strict=True):
        plan = explain("stable-diffusion-v1-5", card, batch_size=batch, **SMALL)
        assert cell.settings == plan.changes
        assert cell.peak_allocated_bytes == plan.predicted.peak_allocated_bytes
        assert cell.latency_seconds == plan.predicted.latency_seconds
        assert cell.samples_per_second == pytest.approx(batch / plan.predicted.latency_seconds)


def test_what_does_not_fit_is_a_row_with_what_is_missing() -> None:
    fits, short = (compare(["stable-diffusion-v1-5"], ["RTX 3060"], memory=budget, **SMALL)[0] for budget in ("4GiB", "20MiB"))
    assert fits.reason is None
    assert short.settings is None
    assert short.reason.startswith("nothing fits, short by")
    assert short.shortfall_bytes > 0


def test_throughput_grows_the_batch_of_a_row() -> None:
    seen = Glances(FAMILIES["sd15"].build(), objective="throughput", height=32, width=32, num_inference_steps=2).on("RTX 4090")
    assert seen.batch_size > 1


def test_unknown_models_and_impossible_options_end_it_at_once() -> None:
    with pytest.raises(ProfileError):
        compare(["nonsense-5"], ["T4"])
    with pytest.raises(UsageError):
        compare(["stable-diffusion-v1-5"], ["T4"], fix={"offload": "nowhere"})
