"""Group offload to files: no host memory, no copies back, and the time of reading."""

from __future__ import annotations

from typing import Any

import pytest

import planner
from planner.types import Estimate
from tests.zoo import FAMILIES

BLOCKS = {"offload": "group_block", "compile": "none"}


@pytest.fixture(scope="module")
def pipe() -> Any:
    return FAMILIES["flux"].build()


def priced(pipe: Any, **settings: Any) -> Estimate:
    return planner.estimate(pipe, "RTX 3060", {**BLOCKS, **settings}, calibrate="never", height=64, width=64, num_inference_steps=4)


def on_disk(estimate: Estimate) -> int:
    return sum(term.bytes or 0 for term in estimate.terms if term.name == "weights in files on disk")


def test_what_goes_to_files_leaves_the_host(pipe: Any) -> None:
    kept, filed = priced(pipe), priced(pipe, offload_disk=True)
    assert on_disk(kept) == 0
    assert on_disk(filed) > 0
    assert on_disk(filed) + filed.host_bytes == kept.host_bytes
    assert filed.peak_allocated_bytes == kept.peak_allocated_bytes


def test_a_stream_pins_no_copy_of_what_is_in_files(pipe: Any) -> None:
    kept, filed = priced(pipe, offload_stream=True), priced(pipe, offload_stream=True, offload_disk=True)
    assert on_disk(filed) == on_disk(priced(pipe, offload_disk=True))
    assert kept.host_bytes - filed.host_bytes > on_disk(filed)


def test_components_with_tied_weights_stay_in_host_memory(pipe: Any) -> None:
    """T5 shares its embedding between two modules; diffusers would write the second of them empty."""
    tied = sum(item.numel() * item.element_size() for item in pipe.text_encoder_2.parameters())
    assert priced(pipe, offload_disk=True).host_bytes == tied


def test_reading_takes_the_disks_time_where_the_host_cannot_hold_the_files() -> None:
    """28 GiB of FLUX in files, 8 steps: the reads of each step come from memory or from the drive."""
    fixed = {**BLOCKS, "offload_disk": True, "offload_stream": False, "offload_keep": "none"}
    asked: dict[str, Any] = {"calibrate": "never", "num_inference_steps": 8, "fix": fixed}
    cached = planner.explain("flux.1-dev", "RTX 3060", host_memory="64GiB", **asked).predicted
    read = planner.explain("flux.1-dev", "RTX 3060", host_memory="24GiB", **asked).predicted
    assert read.host_bytes == cached.host_bytes
    drive = on_disk(read) * 8 / 3.5e9
    assert read.latency_seconds > 0.5 * drive
    assert read.latency_seconds > 1.5 * cached.latency_seconds


def test_files_are_chosen_where_the_host_has_no_memory_and_only_there() -> None:
    asked: dict[str, Any] = {"calibrate": "never", "num_inference_steps": 4, "fix": {"compile": "none"}}
    little = planner.explain("flux.1-dev", "RTX 3060", host_memory="12GiB", **asked)
    assert little.settings["offload_disk"] is True
    assert little.predicted.host_bytes <= 12 << 30
    assert planner.explain("flux.1-dev", "RTX 3060", host_memory="128GiB", **asked).settings["offload_disk"] is False
