"""Applying and undoing settings on real small pipelines: undo is the identity, and so is every failure."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from random import Random
from typing import Any

import numpy as np
import pytest
import torch

from planner.apply import apply_settings, in_order
from planner.dryrun.facts import read_facts
from planner.errors import ApplyError, UnsupportedPipeline, UsageError
from planner.facts import PipelineFacts
from planner.knobs import KNOBS, Context, Site, knob, normalize, violations
from planner.knobs import live_offload as live_offload_module
from planner.snapshot import Snapshot, checksum, read_switches
from planner.types import Device, KnobValue, Workload
from tests import sim
from tests.zoo import FAMILIES

TRIED = (
    "sd15", "sdxl", "sdxl_controlnet", "sd3", "flux", "wan22_t2v", "pixart_sigma", "qwen_image", "cogvideox",
    "kandinsky22", "deepfloyd_if", "z_image",
)  # fmt: skip
USABLE = {"inductor": None, "torchao": None}


@functools.cache
def prepared(family: str) -> tuple[Any, np.ndarray, PipelineFacts]:
    """A pipeline that has run once (first runs fill caches of their own), its output, and its facts."""
    pipe = FAMILIES[family].build()
    FAMILIES[family].run(pipe)
    return pipe, FAMILIES[family].run(pipe), read_facts(pipe)


def device(kind: str = "cpu") -> Device:
    return Device(
        name=kind, kind=kind, architecture=kind, total_bytes=1 << 34, basis="assumed",  # type: ignore[arg-type]
        flops_per_second={"fp32": 1e11}, bandwidth_bytes_per_second=1e10,
    )  # fmt: skip


def context(facts: PipelineFacts, kind: str = "cpu") -> Context:
    return Context(facts=facts, device=device(kind), workload=Workload(batch_size=2), quality="lossy", usable=USABLE)


def assert_untouched(family: str, before: Snapshot, *, run: bool = True) -> None:
    pipe, reference, _ = prepared(family)
    assert before.differences(pipe) == []
    if run:
        assert np.array_equal(FAMILIES[family].run(pipe), reference)


def single_values() -> Iterator[Any]:
    """Every value of every knob that the CPU's rules allow, per family; compilers have tests of their own."""
    for family in TRIED:
        for each in KNOBS:
            if each.name != "compile":
                yield pytest.param(family, each, id=f"{family}-{each.name}")


@pytest.mark.parametrize(("family", "each"), list(single_values()))
def test_every_value_runs_and_undo_is_the_identity(family: str, each: Any) -> None:
    pipe, reference, facts = prepared(family)
    for value in each.values(context(facts))[1:]:
        before = Snapshot.of(pipe, checksums=True)
        applied = apply_settings(pipe, {each.name: value}, "cpu", facts)
        try:
            assert np.isfinite(FAMILIES[family].run(pipe)).all()
        finally:
            applied.undo()
        assert not applied.in_force
        assert_untouched(family, before)
        applied.undo()
        assert np.array_equal(FAMILIES[family].run(pipe), reference)


CHANGES_OUTPUT_BY = {
    # Largest difference of any output value, images in 0..1; kernels and summation order only.
    "channels_last": 1e-4, "attention": 1e-4, "vae_slicing": 1e-4, "fuse_qkv": 1e-4, "chunked_forward": 1e-4,
}  # fmt: skip


@pytest.mark.parametrize("family", TRIED)
def test_settings_that_promise_the_same_numbers_keep_them(family: str) -> None:
    pipe, reference, facts = prepared(family)
    for name, tolerance in CHANGES_OUTPUT_BY.items():
        for value in knob(name).values(context(facts))[1:]:
            applied = apply_settings(pipe, {name: value}, "cpu", facts)
            try:
                assert np.abs(FAMILIES[family].run(pipe) - reference).max() < tolerance, (name, value)
            finally:
                applied.undo()


COMBINATIONS = int(os.environ.get("PLANNER_COMBINATIONS", "200"))
"""Random combinations to apply and undo, in one run over all families that are tried."""
SEED = 20
COMPILED_SHARE = 0.05
"""Share of the combinations with a compiler: tracing takes a hundred times as long as a run of these small models."""


def drawn(random: Random, where: Context) -> dict[str, KnobValue]:
    """A combination that the rules allow."""
    while True:
        changed = [each for each in KNOBS if random.random() < (COMPILED_SHARE if each.name == "compile" else 1 / 3)]
        full = normalize({each.name: random.choice(each.values(where)) for each in changed}, where)
        if full != normalize({}, where) and not violations(full, where):
            return full


def attributes(pipe: Any) -> dict[str, set[str]]:
    parts = {"pipe": pipe, **{name: part for name, part in pipe.components.items() if part is not None}}
    return {name: set(vars(part)) for name, part in parts.items() if hasattr(part, "__dict__")}


@pytest.mark.slow
def test_random_combinations_undo_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half on the CPU, half on the simulated accelerator, where there is offload. Weights, output, attributes, switches."""
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **options: compiler(*args, **options, backend="eager"))
    dynamo = torch._dynamo.config.get_config_copy()
    random, done, turn = Random(SEED), set(), 0
    while len(done) < COMBINATIONS:
        family, kind = TRIED[turn % len(TRIED)], ("cpu", "sim")[turn // len(TRIED) % 2]
        turn += 1
        pipe, _, facts = prepared(family)
        full = drawn(random, context(facts, kind))
        if (key := (family, kind, *full.items())) in done:
            continue
        done.add(key)
        before, names = Snapshot.of(pipe, checksums=True), attributes(pipe)
        with sim.active() if kind == "sim" else nullcontext():
            applied = apply_settings(pipe, full, sim.load() if kind == "sim" else "cpu", facts)
            try:
                FAMILIES[family].run(pipe)
            finally:
                applied.undo()
        assert_untouched(family, before)
        assert attributes(pipe) == names, (family, full)
        assert torch._dynamo.config.get_config_copy() == dynamo, (family, full)
    torch._dynamo.reset()
    assert len({family for family, *_ in done}) >= min(8, COMBINATIONS)


SIM_SETTINGS: tuple[dict[str, KnobValue], ...] = (
    {"offload": "none"},
    {"offload": "model"},
    {"offload": "sequential"},
    {"offload": "group_block"},
    {"offload": "group_block", "offload_blocks": 2},
    {"offload": "group_leaf"},
    {"offload": "group_block", "offload_keep": "vae"},
    {"offload": "sequential", "offload_keep": "text_encoder"},
    {"offload": "model", "dtype": "bf16", "vae_tiling": True},
    {"offload": "group_leaf", "fuse_qkv": True},
    {"offload": "group_block", "quantization": "{denoiser}=fp8_layerwise"},
)


def filled(chosen: dict[str, KnobValue], facts: PipelineFacts) -> dict[str, KnobValue]:
    denoiser = facts.of_role("denoiser")[0].name
    return {name: value.format(denoiser=denoiser) if isinstance(value, str) else value for name, value in chosen.items()}


@pytest.mark.parametrize("family", ["sd15", "flux", "wan22_t2v", "sdxl_controlnet"])
@pytest.mark.parametrize("chosen", SIM_SETTINGS, ids=lambda chosen: "-".join(map(str, chosen.values())))
def test_offload_on_an_accelerator_runs_and_undo_is_the_identity(family: str, chosen: dict[str, KnobValue]) -> None:
    pipe, reference, facts = prepared(family)
    chosen = filled(chosen, facts)
    assert violations(chosen, context(facts, "sim")) == []
    before = Snapshot.of(pipe, checksums=True)
    with sim.active() as memory:
        applied = apply_settings(pipe, chosen, sim.load(), facts)
        output = FAMILIES[family].run(pipe)
        assert memory.peak_bytes > 0
        assert read_facts(pipe).offload == chosen["offload"]
        applied.undo()
    assert np.isfinite(output).all()
    if chosen.keys() <= {"offload", "offload_blocks", "offload_keep"}:
        assert np.abs(output - reference).max() < 1e-4
    assert_untouched(family, before)


def test_what_is_there_already_is_not_moved() -> None:
    pipe, _, facts = prepared("sd15")
    before = Snapshot.of(pipe)
    applied = apply_settings(pipe, {"offload": "none", "dtype": "fp32", "attention": "sdpa"}, "cpu", facts)
    assert before.differences(pipe, addresses=True) == []
    applied.undo()
    assert before.differences(pipe, addresses=True) == []


def test_offload_to_disk_comes_back_and_keeps_components_apart(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two CLIPs of one class once shared files; the device is the CPU here, as safetensors cannot load elsewhere."""
    family = "sd3"
    pipe, reference, facts = prepared(family)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = Snapshot.of(pipe, checksums=True)
    site = Site(pipe=pipe, device="cpu", facts=facts, settings={"offload_disk": True})
    undo = live_offload_module.group(site, "group_leaf")
    (weights,) = tmp_path.iterdir()
    assert weights.stat().st_mode & 0o777 == 0o700
    folders = {path.parent.name for path in weights.rglob("*.safetensors")}
    assert {"text_encoder", "text_encoder_2", "transformer", "vae"} <= folders
    assert "text_encoder_3" not in folders  # T5: tied weights
    assert np.array_equal(FAMILIES[family].run(pipe), reference)
    undo()
    assert not list(tmp_path.iterdir())
    assert_untouched(family, before)


# --- failures -------------------------------------------------------------------------------------------------------

@pytest.mark.skipif(sys.platform == "win32", reason="limits on file sizes are POSIX")
def test_a_disk_that_is_full_rolls_weights_in_files_back(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit on file sizes is what a process sees of a full disk: writing stops in the middle of a component."""
    import resource

    pipe, _, facts = prepared("flux")
    before = Snapshot.of(pipe, checksums=True)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        with pytest.raises(ApplyError, match=r"offload=group_leaf could not be applied .*as it was before"):
            apply_settings(pipe, {"offload": "group_leaf", "offload_disk": True}, "cpu", facts)
        assert not list(tmp_path.iterdir())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_untouched("flux", before)


def test_running_out_of_memory_while_moving_rolls_back() -> None:
    pipe, _, facts = prepared("flux")
    before = Snapshot.of(pipe, checksums=True)
    weights = sum(component.weight_bytes for component in facts.components)
    with sim.active(weights // 2), pytest.raises(ApplyError, match=r"offload=none.*OutOfMemoryError"):
        apply_settings(pipe, {"vae_slicing": True, "offload": "none"}, sim.load(), facts)
    assert_untouched("flux", before)


def test_an_unknown_setting_touches_nothing() -> None:
    pipe, _, facts = prepared("sd15")
    before = Snapshot.of(pipe)
    with pytest.raises(UsageError, match="did you mean dtype"):
        apply_settings(pipe, {"vae_slicing": True, "dtpye": "bf16"}, "cpu", facts)
    assert before.differences(pipe) == []


def test_undo_reports_what_it_cannot_put_back() -> None:
    pipe = FAMILIES["sd15"].build()
    applied = apply_settings(pipe, {"vae_slicing": True}, "cpu", read_facts(pipe))
    pipe.unet.conv_in.weight.data = pipe.unet.conv_in.weight.data.double()
    with pytest.raises(ApplyError, match=r"conv_in\.weight: dtype"):
        applied.undo()


# --- traps of the libraries -----------------------------------------------------------------------------------------


def test_the_process_wide_attention_backend_does_not_leak() -> None:
    pipe, _, facts = prepared("flux")
    switches = read_switches()
    applied = apply_settings(pipe, {"attention": "_native_math"}, "cpu", facts)
    assert read_switches() == switches
    assert pipe.transformer.transformer_blocks[0].attn.processor._attention_backend == "_native_math"
    applied.undo()
    assert pipe.transformer.transformer_blocks[0].attn.processor._attention_backend is None


def test_added_kv_processors_come_back_where_diffusers_loses_them() -> None:
    pipe, _, facts = prepared("deepfloyd_if")
    names = {type(processor).__name__ for processor in pipe.unet.attn_processors.values()}
    pipe.enable_attention_slicing()
    saved = dict(prepared("deepfloyd_if")[0].unet.attn_processors)
    pipe.disable_attention_slicing()
    assert {type(processor).__name__ for processor in pipe.unet.attn_processors.values()} != names, "diffusers fixed it"
    del saved
    prepared.cache_clear()
    pipe, _, facts = prepared("deepfloyd_if")
    apply_settings(pipe, {"attention": "sliced"}, "cpu", facts).undo()
    assert {type(processor).__name__ for processor in pipe.unet.attn_processors.values()} == names


def test_casting_respects_what_must_stay_in_float32() -> None:
    pipe, _, facts = prepared("wan22_t2v")
    kept = [name for name, _ in pipe.transformer.named_parameters() if "time_embedder" in name.split(".")]
    assert kept
    applied = apply_settings(pipe, {"dtype": "bf16"}, "cpu", facts)
    weights = dict(pipe.transformer.named_parameters())
    assert {weights[name].dtype for name in kept} == {torch.float32}
    assert weights["blocks.0.attn1.to_q.weight"].dtype == torch.bfloat16
    applied.undo()


def test_fusing_leaves_the_random_state_and_no_fused_weights() -> None:
    pipe, _, facts = prepared("sd15")
    state = torch.get_rng_state()
    parameters = len(list(pipe.unet.parameters()))
    applied = apply_settings(pipe, {"fuse_qkv": True}, "cpu", facts)
    assert len(list(pipe.unet.parameters())) > parameters
    assert torch.equal(torch.get_rng_state(), state)
    applied.undo()
    assert len(list(pipe.unet.parameters())) == parameters


def test_tiles_are_scaled_and_restored() -> None:
    pipe, _, facts = prepared("wan22_t2v")
    applied = apply_settings(pipe, {"vae_tiling": True, "vae_tile": 128}, "cpu", facts)
    assert (pipe.vae.tile_sample_min_height, pipe.vae.tile_sample_stride_width) == (128, 96)
    applied.undo()
    assert (pipe.vae.tile_sample_min_height, pipe.vae.tile_sample_stride_width) == (256, 192)
    assert not pipe.vae.use_tiling


def test_model_offload_wraps_compiled_modules_before_it_hooks_them() -> None:
    chosen: dict[str, KnobValue] = {"compile": "default", "offload": "model"}
    assert [each.name for each in in_order(chosen)] == ["compile", "offload"]
    pipe, _, facts = prepared("flux")
    before = Snapshot.of(pipe, checksums=True)
    with sim.active():
        applied = apply_settings(pipe, chosen, sim.load(), facts)
        assert type(pipe.transformer).__name__ == "OptimizedModule"
        assert hasattr(pipe.transformer, "_hf_hook")
        assert read_facts(pipe).component("transformer") == facts.component("transformer")
        applied.undo()
    assert_untouched("flux", before)


# --- compilers ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("family", "value"), [("sd15", "jit-trace"), ("flux", "jit-trace"), ("flux", "default")])
def test_compiled_denoisers_give_the_same_images_and_come_back(family: str, value: str) -> None:
    pipe, reference, facts = prepared(family)
    before = Snapshot.of(pipe, checksums=True)
    applied = apply_settings(pipe, {"compile": value}, "cpu", facts)
    output = FAMILIES[family].run(pipe)
    applied.undo()
    assert np.abs(output - reference).max() < 1e-4
    assert_untouched(family, before)


# --- facts and snapshots --------------------------------------------------------------------------------------------


def test_facts_count_what_is_stored() -> None:
    pipe, _, facts = prepared("sd15")
    unet = facts.component("unet")
    assert unet.weight_bytes == 4 * sum(weight.numel() for weight in pipe.unet.parameters())
    assert unet.weight_bytes == sum(leaf.bytes for leaf in unet.leaves)
    linears = [part for part in pipe.unet.modules() if isinstance(part, torch.nn.Linear)]
    assert unet.linear_parameters == sum(part.weight.numel() for part in linears)
    assert (unet.role, unet.dtype, facts.vae_shares_dtype) == ("denoiser", "fp32", True)
    assert prepared("flux")[2].component("text_encoder_2").tied_weights


def test_facts_of_quantized_weights_are_their_real_bytes() -> None:
    pipe, _, facts = prepared("flux")
    applied = apply_settings(pipe, {"quantization": "transformer=int8wo"}, "cpu", facts)
    quantized = read_facts(pipe).component("transformer")
    applied.undo()
    plain = facts.component("transformer")
    linears = [part for part in pipe.transformer.modules() if isinstance(part, torch.nn.Linear)]
    saved = sum(3 * part.weight.numel() - 4 * part.out_features for part in linears)  # a float scale per row
    zero_points = plain.weight_bytes - saved
    assert quantized.quantization == "torchao"
    assert quantized.weight_bytes < plain.weight_bytes
    assert zero_points <= quantized.weight_bytes <= zero_points + sum(8 * part.out_features for part in linears)


def test_facts_of_meta_modules_equal_those_of_real_ones() -> None:
    pipe = FAMILIES["sd15"].build()
    real = read_facts(pipe)
    for name in ("unet", "vae", "text_encoder"):
        getattr(pipe, name).to("meta")
    meta = read_facts(pipe)
    assert meta.device == "meta"
    assert meta.components == real.components


def test_facts_refuse_what_is_no_pipeline() -> None:
    with pytest.raises(UnsupportedPipeline, match=r"torch\.nn\.modules\.linear\.Linear is no diffusers pipeline"):
        read_facts(torch.nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda pipe: setattr(pipe.unet, "training", True), "unet.training"),
        (lambda pipe: setattr(pipe.unet.conv_in, "forward", lambda x: x), "unet.conv_in.forward"),
        (lambda pipe: pipe.unet.conv_in.weight.data.mul_(2), "its bits changed"),
        (lambda pipe: pipe.unet.register_forward_hook(lambda *a: None), "unet._forward_hooks"),
        (lambda pipe: setattr(pipe, "_all_hooks", []), "pipe._all_hooks"),
        (lambda pipe: pipe.unet.conv_in.weight.requires_grad_(False), "requires_grad was True, is False"),
        (lambda pipe: setattr(pipe.vae, "use_tiling", True), "vae.use_tiling"),
        (lambda pipe: setattr(pipe.unet.conv_in, "weight", torch.nn.Parameter(pipe.unet.conv_in.weight.data)), "object"),
        (lambda pipe: setattr(pipe, "scheduler", type(pipe.scheduler)()), "pipe.scheduler"),
        (lambda pipe: torch.set_float32_matmul_precision("high"), "process.float32_matmul_precision"),
    ],
)  # fmt: skip
def test_snapshots_see_and_restore(change: Callable[[Any], Any], said: str) -> None:
    pipe = FAMILIES["sd15"].build()
    before = Snapshot.of(pipe, checksums=True)
    change(pipe)
    found = before.differences(pipe)
    assert len(found) == 1, found
    assert said in found[0]
    before.restore(pipe)
    assert before.differences(pipe) == ([] if "bits" not in said else found)


def test_checksums_read_bits_not_values() -> None:
    assert checksum(torch.tensor([0.0])) != checksum(torch.tensor([-0.0]))
    assert checksum(torch.tensor([float("nan")])) == checksum(torch.tensor([float("nan")]))
