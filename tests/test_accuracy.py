"""Rows become recipes; the accuracy targets hold on rows whose traces are quick to make."""

from __future__ import annotations

from pathlib import Path

import pytest

from planner.validate import Case, express, read_table
from planner.validate.counters import read_counter
from planner.validate.predict import Predictor, card, predictor, quantized

TABLE = Path(__file__).parent.parent / "calibration/published/published.csv"


def cases() -> dict[str, Case]:
    found = (express(row) for row in read_table(TABLE))
    return {case.row: case for case in found if isinstance(case, Case)}


def test_a_card_is_taken_in_the_size_the_row_states() -> None:
    case = next(iter(cases().values()))
    for name, gib, expected in (
        ("A100", 40, "NVIDIA A100-SXM4-40GB"),
        ("A100", 80, "NVIDIA A100-SXM4-80GB"),
        ("A100-SXM 80GB", 80, "NVIDIA A100-SXM4-80GB"),
        ("A100-PCIE-40GB", 40, "NVIDIA A100-PCIE-40GB"),
        ("RTX 3060", 12, "NVIDIA GeForce RTX 3060"),
    ):
        device = card(case.model_copy(update={"gpu": name, "gpu_memory_bytes": gib << 30}))
        assert device.name == expected
        assert device.budget_bytes is not None
        assert device.budget_bytes < device.total_bytes


def test_schemes_of_libraries_have_their_own_storage() -> None:
    assert quantized("transformer=nf4,text_encoder_2=nf4", "bitsandbytes") == {"transformer": "nf4", "text_encoder_2": "nf4"}
    assert quantized("transformer=int8dq", "bitsandbytes") == {"transformer": "llm_int8"}
    assert quantized("transformer=int4wo", "quanto") == {"transformer": "quanto_int4"}
    assert quantized("none", None) == {}


def test_memory_after_a_call_is_told_from_its_peak() -> None:
    after = read_counter("peak_unknown_gb", 12.086, "quanto-001", "CUDA 12.2; optimum-quanto 285862b")
    peak = read_counter("peak_unknown_gb", 12.086, "other-001", "")
    assert after is not None
    assert peak is not None
    assert (after.counter, peak.counter) == ("resting_allocated_bytes", "peak_allocated_bytes")


def test_component_settings_reach_that_component_only() -> None:
    case = cases()["pr11682-008"]
    _, recipe = Predictor().priced(case)
    assert (recipe.offload, recipe.of("transformer").offload, recipe.of("vae").offload) == ("none", "group_leaf", "none")


@pytest.mark.slow
@pytest.mark.parametrize(("row", "within"), [
    ("tao-flux-001", 0.01), ("tao-flux-025", 0.01), ("tao-flux-049", 0.01), ("tao-flux-069", 0.01), ("tao-flux-051", 0.01),
    ("onediff-006", 0.03), ("onediff-012", 0.03), ("onediff-021", 0.03), ("pr11682-004", 0.03), ("pr11682-006", 0.03),
    ("pr11682-008", 0.03), ("dquant-003", 0.06), ("dquant-025", 0.06), ("smopt-002", 0.03), ("quanto-009", 0.03),
])  # fmt: skip
def test_published_memory(row: str, within: float) -> None:
    case = cases()[row]
    prediction = predictor()(case)
    assert prediction.value == pytest.approx(case.measured, rel=within)
    assert prediction.fits is True
