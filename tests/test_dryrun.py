"""The dry run as the planner uses it: a live pipeline is only read, calls are counted exactly, failures name themselves."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import DynamicCache

from planner.dryrun.components import components
from planner.dryrun.facts import own_tensors, tensor_bytes
from planner.dryrun.recorder import ENDLESS_PASSES
from planner.dryrun.run import DryRun
from planner.dryrun.session import Session
from planner.dryrun.trace import VaeMode
from planner.errors import UnsupportedPipeline, UsageError
from planner.types import Workload
from tests import sim
from tests.zoo import FAMILIES, Case


def family(name: str) -> tuple[Case, Any]:
    return FAMILIES[name], FAMILIES[name].build()


def trace_of(name: str, workload: Workload | None = None, **inputs: Any) -> Any:
    case, pipe = family(name)
    return DryRun(pipe, workload or Workload(), {**case.inputs(pipe), **inputs}).trace()


# -- a live pipeline is only read ---------------------------------------------------------------------------------------


def offloaded(pipe: Any) -> None:
    from accelerate import cpu_offload

    cpu_offload(pipe.unet, execution_device=torch.device("cpu"), offload_buffers=True)


def group_offloaded(pipe: Any) -> None:
    cpu = torch.device("cpu")
    pipe.unet.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")


def quantized(pipe: Any) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(pipe.unet, Int8WeightOnlyConfig())


class LowRank(nn.Module):
    """A linear layer with a LoRA on top, laid out as peft lays it out."""

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base.out_features, bias=False)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


def adapted(pipe: Any) -> None:
    for part in list(pipe.unet.modules()):
        if isinstance(getattr(part, "to_q", None), nn.Linear):
            part.to_q = LowRank(part.to_q)


def compiled(pipe: Any) -> None:
    pipe.unet = torch.compile(pipe.unet)
    pipe.vae.decode = torch.compile(pipe.vae.decode)


def compiled_in_place(pipe: Any) -> None:
    pipe.unet.compile()


def hooked(pipe: Any) -> None:
    pipe.unet.register_forward_hook(_must_not_run)
    pipe.vae.decoder.register_forward_pre_hook(_must_not_run)


def cast_by_layer(pipe: Any) -> None:
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def half(pipe: Any) -> None:
    pipe.to(torch.bfloat16)


def elsewhere(pipe: Any) -> None:
    pipe.to(sim.load())


def model_offloaded(pipe: Any) -> None:
    pipe.enable_model_cpu_offload(device=sim.load())


def sequentially_offloaded(pipe: Any) -> None:
    pipe.enable_sequential_cpu_offload(device=sim.load())


def group_offloaded_elsewhere(pipe: Any) -> None:
    pipe.enable_group_offload(onload_device=sim.load(), offload_type="block_level", num_blocks_per_group=1)


def _must_not_run(*args: Any) -> None:
    raise AssertionError("a user's hook ran during the dry run")


STATES: tuple[Callable[[Any], None], ...] = (
    offloaded, group_offloaded, quantized, adapted, compiled, compiled_in_place, hooked, cast_by_layer, half)  # fmt: skip
ON_A_DEVICE: tuple[Callable[[Any], None], ...] = (elsewhere, model_offloaded, sequentially_offloaded, group_offloaded_elsewhere)


def state_of(pipe: Any) -> Iterator[Any]:
    """Everything of a pipeline that a dry run could disturb, comparable with ``==``."""
    yield [(name, id(value)) for name, value in vars(pipe).items()]
    yield dict(pipe.config)
    for name, module in components(pipe).items():
        for path, part in module.named_modules():
            attributes = [(key, id(value)) for key, value in part.__dict__.items()]
            tensors = [(key, id(t), t.dtype, t.device, t.requires_grad, _pointer(t)) for key, t in own_tensors(part)]
            hooks = [list(part._forward_hooks.items()), list(part._forward_pre_hooks.items())]
            yield name, path, part.training, attributes, tensors, hooks


def _pointer(tensor: torch.Tensor) -> Any:
    inner = getattr(tensor, "__tensor_flatten__", None)
    if inner is not None:
        return [getattr(tensor, name).data_ptr() for name in inner()[0]]
    return tensor.data_ptr() if tensor.device.type == "cpu" else None


def random_states() -> Any:
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


@pytest.mark.slow
@pytest.mark.parametrize("prepare", STATES, ids=lambda state: state.__name__)
def test_a_live_pipeline_in_any_state_is_traced_without_being_touched(prepare: Callable[[Any], None]) -> None:
    case, pipe = family("sd15")
    plain = DryRun(pipe, Workload(), case.inputs(pipe)).trace()
    prepare(pipe)
    inputs = case.inputs(pipe)
    before, generator, numbers = list(state_of(pipe)), inputs["generator"].get_state(), random_states()
    call = nn.Module.__call__
    trace = DryRun(pipe, Workload(), inputs).trace()
    assert list(state_of(pipe)) == before
    assert torch.equal(inputs["generator"].get_state(), generator)
    assert random_states() == numbers
    assert nn.Module.__call__ is call
    assert [trace.calls[event.call].name for event in trace.events] == [plain.calls[event.call].name for event in plain.events]
    if prepare is not adapted:
        assert [c.total_flops for c in trace.calls] == [c.total_flops for c in plain.calls]
    else:
        assert trace.calls[1].total_flops > plain.calls[1].total_flops


@pytest.mark.parametrize("prepare", ON_A_DEVICE, ids=lambda state: state.__name__)
def test_a_pipeline_on_a_device_is_traced_without_copying_a_weight(prepare: Callable[[Any], None]) -> None:
    """Where its weights are, or where hooks bring them for a call, makes no difference to the trace."""
    case, pipe = family("sd15")
    plain = DryRun(pipe, Workload(), case.inputs(pipe)).trace()
    with sim.active() as memory:
        prepare(pipe)
        before, numbers = list(state_of(pipe)), random_states()
        counters, copied_bytes = (memory.used_bytes, memory.h2d_bytes, memory.allocations), memory.d2h_bytes
        trace = DryRun(pipe, Workload(), case.inputs(pipe)).trace()
        assert (memory.used_bytes, memory.h2d_bytes, memory.allocations) == counters
        tables = {id(t): t.nbytes for m in components(pipe).values() for t in m.buffers() if not t.is_floating_point()}
        assert memory.d2h_bytes - copied_bytes <= sum(tables.values())  # positions: integers whose values a trace needs
        assert list(state_of(pipe)) == before
        assert random_states() == numbers
        assert [trace.calls[event.call].name for event in trace.events] == [plain.calls[event.call].name for event in plain.events]
        assert [call.total_flops for call in trace.calls] == [call.total_flops for call in plain.calls]
        del pipe, before


def test_weights_count_as_they_are_stored() -> None:
    case, pipe = family("sd15")
    quantized(pipe)
    trace = DryRun(pipe, Workload(), case.inputs(pipe)).trace()
    stored = sum(tensor_bytes(t) for part in pipe.unet.modules() for _, t in own_tensors(part))
    assert stored < sum(t.numel() * 4 for t in pipe.unet.parameters())
    assert next(event for event in trace.events if trace.calls[event.call].component == "unet").weight_bytes == stored


def test_an_accelerate_offloaded_pipeline_still_runs_the_same_after_a_dry_run() -> None:
    case, pipe = family("sd15")
    expected = case.run(pipe)
    offloaded(pipe)
    DryRun(pipe, Workload(), case.inputs(pipe)).trace()
    np.testing.assert_allclose(case.run(pipe), expected, atol=1e-6)


# -- the user's arguments -----------------------------------------------------------------------------------------------


def test_callbacks_are_not_called_and_tensors_not_changed() -> None:
    case, pipe = family("sd15")
    latents = torch.randn(1, 4, 16, 16)
    kept = latents.clone()
    inputs = case.inputs(pipe) | {"callback_on_step_end": _must_not_run, "latents": latents}
    DryRun(pipe, Workload(), inputs).trace()
    assert torch.equal(latents, kept)


def test_several_generators_are_left_where_they_are() -> None:
    case, pipe = family("sd15")
    generators = [torch.Generator().manual_seed(index) for index in range(2)]
    before = [generator.get_state() for generator in generators]
    inputs = case.inputs(pipe) | {"prompt": ["a", "b"], "generator": generators}
    assert DryRun(pipe, Workload(), inputs).trace().batch_size == 2
    assert all(torch.equal(old, new.get_state()) for old, new in zip(before, generators, strict=True))


# -- counts and shapes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd15", "flux", "ddpm", "chroma", "wan22_t2v"])
def test_more_steps_are_more_calls_but_no_more_traces(name: str) -> None:
    few, many = trace_of(name, num_inference_steps=4), trace_of(name, num_inference_steps=24)
    assert (few.steps, many.steps) == (4, 24)
    assert len(many.calls) == len(few.calls)
    assert len(many.events) > len(few.events)


def test_a_time_step_passed_as_a_number_does_not_make_every_step_another_call() -> None:
    _, pipe = family("ddpm")

    class Numbers(type(pipe)):
        def __call__(self, steps: int) -> Any:
            sample = torch.zeros(1, 3, 8, 8)
            for t in range(steps):
                sample = self.unet(sample, t).sample
            return (sample,)

    pipe.__class__ = Numbers
    traces = [DryRun(pipe, Workload(), {"steps": steps}).trace() for steps in (20, 60)]
    assert [len(trace.events) for trace in traces] == [20, 60]
    assert len(traces[0].calls) == len(traces[1].calls) < 20


def test_guidance_doubles_the_batch_in_the_loop() -> None:
    with_guidance, without = trace_of("sd15", guidance_scale=7.5), trace_of("sd15", guidance_scale=1.0)
    flops = [next(c.total_flops for c in trace.calls if c.component == "unet") for trace in (with_guidance, without)]
    assert flops[0] == pytest.approx(2 * flops[1], rel=0.01)


def test_batch_and_sizes_come_from_the_workload() -> None:
    _, pipe = family("sd15")
    inputs = {"prompt": "a", "num_inference_steps": 1}
    dry_run = DryRun(pipe, Workload(batch_size=4, height=32, width=64), inputs)
    decode = {batch: dry_run.trace(None, batch).calls[-1] for batch in (1, 2, 4)}
    assert decode[4].output_bytes == 4 * 3 * 32 * 64 * 4
    assert decode[4].total_flops == 2 * decode[2].total_flops == 4 * decode[1].total_flops


def test_a_dtype_halves_weights_and_activations() -> None:
    case, pipe = family("sd15")
    dry_run = DryRun(pipe, Workload(), case.inputs(pipe))
    full, half_sized = dry_run.trace("fp32"), dry_run.trace("bf16")
    assert half_sized.dtype == "bf16"
    for before, after in zip(full.events, half_sized.events, strict=True):
        assert after.weight_bytes == pytest.approx(before.weight_bytes / 2, rel=0.01)
    assert half_sized.calls[1].live_peak_bytes == pytest.approx(full.calls[1].live_peak_bytes / 2, rel=0.1)
    assert {parameter.dtype for parameter in pipe.unet.parameters()} == {torch.float32}


def test_a_vae_is_traced_in_other_modes() -> None:
    case, pipe = family("sd15")
    inputs = case.inputs(pipe) | {"prompt": ["a"] * 4, "height": 64, "width": 64}
    trace = DryRun(pipe, Workload(), inputs).trace(None, None, (VaeMode(True), VaeMode(False, 0)))
    decode = next(index for index, call in enumerate(trace.calls) if call.name == "vae.decode")
    whole, sliced, tiled = trace.calls[decode], trace.variants[decode, "slice"], trace.variants[decode, "tile"]
    assert sliced.total_flops == whole.total_flops
    assert sliced.live_peak_bytes < whole.live_peak_bytes / 2
    assert len(tiled) > len(whole)


def test_a_component_that_the_pipeline_casts_is_traced_with_the_weights_it_has_then() -> None:
    case, pipe = family("sdxl")
    trace = DryRun(pipe, Workload(), case.inputs(pipe)).trace("fp16", None, (VaeMode(True), VaeMode(True, 64)))
    decode = next(index for index, call in enumerate(trace.calls) if call.name == "vae.decode")
    whole = trace.calls[decode]
    stored = {name: tensor.numel() * 4 for name, tensor in pipe.vae.named_parameters() if name.startswith(("decoder", "post_quant"))}
    assert whole.param_bytes.sum() == sum(stored.values())
    for mode in ("slice", "slice+tile=64"):  # one picture of one tile: the same work, with the fp32 weights of another cast
        assert trace.variants[decode, mode].param_bytes.tolist() == whole.param_bytes.tolist()


def test_a_mode_that_a_vae_refuses_is_not_offered_and_says_why() -> None:
    case, pipe = family("cogvideox")
    trace = DryRun(pipe, Workload(), case.inputs(pipe)).trace(None, None, (VaeMode(False, 0),))
    assert not trace.variants
    assert all("range() arg 3 must not be zero" in reason for reason in trace.refused.values())
    assert trace.refused


# -- what does not work says so ------------------------------------------------------------------------------------------


def test_a_pipeline_that_fails_names_itself_and_leaves_nothing_behind() -> None:
    _, pipe = family("ddpm")

    class Broken(type(pipe)):
        def __call__(self) -> Any:
            self.unet(torch.zeros(1, 3, 8, 8), 1)
            raise LookupError("the moon is full")

    pipe.__class__ = Broken
    call, autocast, attention = nn.Module.__call__, torch.autocast.__init__, nn.functional.scaled_dot_product_attention
    with pytest.raises(UnsupportedPipeline, match=r"Broken.*LookupError: the moon is full"):
        DryRun(pipe, Workload(), {}).trace()
    assert nn.Module.__call__ is call
    assert torch.autocast.__init__ is autocast
    assert nn.functional.scaled_dot_product_attention is attention
    assert torch.zeros(2).device.type == "cpu"


def test_contradictions_between_workload_and_inputs_are_refused() -> None:
    _, pipe = family("sd15")
    with pytest.raises(UsageError, match="height"):
        DryRun(pipe, Workload(height=64), {"prompt": "a", "height": 32})
    with pytest.raises(UsageError, match="batch_size"):
        DryRun(pipe, Workload(batch_size=3), {"prompt": ["a", "b"]})


# -- fallbacks -------------------------------------------------------------------------------------------------------------


class Awkward(nn.Module):
    """Reads values of computed tensors, counts what it finds, and refuses tensors without values."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.linear = nn.Linear(2048, 2048)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        if self.kind == "tolist":
            return y[:, : 1 + int(y.sum(dim=1).tolist()[0] > 1e9)]
        if self.kind == "unique":
            return y[:, : len(torch.unique(y))]
        if y.device.type != "cpu":
            raise AssertionError("no values")
        return y


@pytest.mark.parametrize(("kind", "word"), [("tolist", "tolist"), ("unique", "unique"), ("refuses", "run on zeros on the CPU")])
def test_what_meta_cannot_do_falls_back_and_is_named(kind: str, word: str) -> None:
    _, pipe = family("ddpm")

    class Uses(type(pipe)):
        def __call__(self) -> Any:
            return (self.unet(torch.ones(4, 2048)),)

    pipe.unet, pipe.__class__ = Awkward(kind), Uses
    trace = DryRun(pipe, Workload(), {}).trace()
    assert any(word in text for text in trace.fallbacks), trace.fallbacks
    assert trace.calls[0].total_flops == 2 * 4 * 2048 * 2048
    assert all(parameter.device.type == "cpu" for parameter in pipe.unet.parameters())


class Writes(nn.Module):
    """Goes on until what it computed says stop, as language models generate; its part asks about values as well."""

    def __init__(self) -> None:
        super().__init__()
        self.part = Doubts()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        while not (x == 0).all():
            x = self.part(x)
        return x


class Doubts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(256, 256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        for _ in range(2):  # more often than the loop around it, and yet no loop without an end
            y = y[:1] if (y > 1e9).any() else y
        return y


def test_a_loop_until_computed_values_say_so_ends() -> None:
    _, pipe = family("ddpm")

    class Uses(type(pipe)):
        def __call__(self) -> Any:
            return (self.unet(torch.ones(4, 256)),)

    pipe.unet, pipe.__class__ = Writes(), Uses
    (call,) = DryRun(pipe, Workload(), {}).trace().calls
    assert f"loop until computed values say so: ended after {ENDLESS_PASSES} passes" in call.fallbacks
    assert call.total_flops == (ENDLESS_PASSES - 1) * 2 * 4 * 256 * 256


class Remembers(nn.Module):
    """Fills what it is handed, as language models fill a cache of keys and values, and reads it at the next call."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor, past: DynamicCache, seen: list[torch.Tensor]) -> torch.Tensor:
        keys, _ = past.update(x, x, 0)
        seen.append(x)
        return self.linear(keys)


def test_what_a_component_leaves_in_a_cache_or_a_list_is_there_at_the_next_call() -> None:
    _, pipe = family("ddpm")

    class Uses(type(pipe)):
        def __call__(self) -> Any:
            made = []
            for _ in range(2):  # the second time its calls are answered from the first
                past, seen = DynamicCache(), []
                made = [self.unet(torch.ones(1, 1, 4, 64), past=past, seen=seen) for _ in range(3)]
                assert (past.get_seq_length(), len(seen)) == (12, 3)
            return (made[-1],)

    pipe.unet, pipe.__class__ = Remembers(), Uses
    trace = DryRun(pipe, Workload(), {}).trace()
    assert [call.total_flops for call in trace.calls] == [2 * rows * 64 * 64 for rows in (4, 8, 12)]
    assert len(trace.events) == 6
    held = [event.held_bytes for event in trace.events]
    assert held[5] - held[3] == pytest.approx(held[2] - held[0])


def test_a_deep_copy_is_one_copy_and_its_bytes_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pipelines copy their scheduler's state; a storage's text has a line per byte."""
    _, pipe = family("ddpm")

    class Uses(type(pipe)):
        def __call__(self) -> Any:
            copies = copy.deepcopy({"latents": torch.ones(1 << 20)})
            return (self.unet(copies["latents"].reshape(512, 2048)),)

    pipe.unet, pipe.__class__ = Awkward("tolist"), Uses
    monkeypatch.setattr(torch.UntypedStorage, "__repr__", _must_not_run)
    (event,) = DryRun(pipe, Workload(), {}).trace().events
    assert event.held_bytes == 4 << 20
    assert event.glue_operations == 2


def test_modules_in_lists_and_nested_pipelines_are_components() -> None:
    _, pipe = family("kandinsky22_combined")
    found = components(pipe)
    assert {"unet", "movq", "prior_prior"} <= set(found)
    assert len({id(module) for module in found.values()}) == len(found)
    stand_in = Session.of(pipe).pipe
    assert stand_in.decoder_pipe.unet is stand_in.unet
    assert stand_in.unet is not pipe.unet
