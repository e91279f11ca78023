"""``component.knob``: one component treated otherwise than the rest, from its spelling to a live pipeline and back."""

from __future__ import annotations

import pytest
import torch

from planner import autoplan, estimate
from planner.dtypes import parse_dtypes
from planner.errors import UsageError
from planner.knobs import parse_settings
from planner.snapshot import Snapshot
from tests.zoo import FAMILIES


@pytest.mark.parametrize(("given", "wanted"), [
    ({"vae.dtype": "fp32"}, {"dtype": "vae=fp32"}),
    ({"vae.dtype": "fp32", "dtype": "bf16"}, {"dtype": "bf16,vae=fp32"}),
    ({"dtype": "bf16", "vae.dtype": "bf16"}, {"dtype": "bf16"}),
    ({"vae.dtype": "fp32", "text_encoder.dtype": "fp16"}, {"dtype": "text_encoder=fp16,vae=fp32"}),
    ({"unet.quantization": "int8wo"}, {"quantization": "unet=int8wo"}),
    ({"quantization": "none", "unet.quantization": "int8wo"}, {"quantization": "unet=int8wo"}),
    ({"quantization": "text_encoder=int8wo", "unet.quantization": "fp8wo"}, {"quantization": "text_encoder=int8wo,unet=fp8wo"}),
])  # fmt: skip
def test_a_dotted_name_is_part_of_the_knobs_own_value(given: dict[str, str], wanted: dict[str, str]) -> None:
    assert parse_settings(given) == wanted
    assert parse_settings(dict(reversed(given.items()))) == wanted
    assert parse_settings(wanted) == wanted


@pytest.mark.parametrize(("given", "told"), [
    ({"vae.offload": "model"}, "offload cannot be set for vae alone"),
    ({"vae.nonsense": "x"}, "no knob is called 'nonsense'"),
    ({"dtype": "fp32,bf16"}, "each once"),
    ({"dtype": "vae=fp32,vae=bf16"}, "each once"),
    ({"dtype": "vae="}, "COMPONENT=DTYPE"),
    ({"vae.dtype": "fp64"}, "COMPONENT=DTYPE"),
])  # fmt: skip
def test_what_cannot_be_meant_is_told(given: dict[str, str], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        parse_settings(given)


def test_a_component_takes_its_own_dtype_then_the_base_then_what_it_has() -> None:
    mixed = parse_dtypes("bf16,vae=fp32")
    assert [mixed.of("vae", "fp16"), mixed.of("unet", "fp16"), parse_dtypes("vae=fp32").of("unet", "fp16")] == ["fp32", "bf16", "fp16"]


def test_an_estimate_counts_each_component_in_its_own_dtype() -> None:
    pipe = FAMILIES["wan21_t2v"].build()
    sizes = {name: sum(p.numel() for p in getattr(pipe, name).parameters()) for name in ("vae", "text_encoder")}
    plain, mixed = (estimate(pipe, "RTX 4090", chosen, num_frames=5, height=32, width=32, num_inference_steps=2)
                    for chosen in ({}, {"vae.dtype": "bf16"}))  # fmt: skip
    before, after = ({phase.component: phase.weights_bytes for phase in found.phases} for found in (plain, mixed))
    assert before["text_encoder"] - after["text_encoder"] == pytest.approx(2 * sizes["vae"], rel=0.02)


def test_a_mix_that_the_pipeline_does_not_run_with_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match=r"dtype=vae=fp16 cannot be used here.*should be the same"):
        estimate(FAMILIES["sd15"].build(), "RTX 4090", {"vae.dtype": "fp16"}, height=32, width=32, num_inference_steps=2)
    with pytest.raises(UsageError, match="has no component 'nope'"):
        estimate(FAMILIES["sd15"].build(), "RTX 4090", {"nope.dtype": "fp16"}, height=32, width=32, num_inference_steps=2)


def test_one_component_is_cast_and_put_back_to_the_bit() -> None:
    case = FAMILIES["wan21_t2v"]
    pipe = case.build()
    inputs = case.inputs(pipe)
    before = Snapshot.of(pipe, checksums=True)
    plan = autoplan(pipe, inputs=inputs, fix={"vae.dtype": "bf16", "compile": "none"}, calibrate="never", verify=False)
    assert plan.settings["dtype"] == "vae=bf16"
    assert {p.dtype for p in pipe.vae.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in pipe.text_encoder.parameters()} == {torch.float32}
    assert "pipe.vae" in plan.to_python()
    assert "pipe.text_encoder" not in plan.to_python()
    plan.run(pipe, **case.inputs(pipe))
    plan.undo(pipe)
    assert before.differences(pipe) == []
