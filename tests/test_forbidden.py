"""Combinations that the rules forbid do fail, or are pointless: the rules do not forbid too much. All tried on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch._dynamo.utils import counters

from planner.apply import apply_settings
from planner.dryrun.facts import read_facts
from planner.errors import ApplyError
from planner.knobs import Site, conflict_between, knob, violations
from planner.knobs import live_offload as live_offload_module
from planner.snapshot import Snapshot
from planner.types import KnobValue
from tests.test_apply import assert_untouched, context, prepared
from tests.zoo import FAMILIES


def site(family: str, **chosen: KnobValue) -> Site:
    pipe, _, facts = prepared(family)
    return Site(pipe=pipe, device="cpu", facts=facts, settings=chosen)


def test_three_dimensional_convolutions_have_no_channels_last() -> None:
    pipe, _, facts = prepared("wan22_t2v")
    assert knob("channels_last").refuse(True, context(facts)) is not None
    with pytest.raises(RuntimeError, match="rank 4"):
        pipe.transformer.to(memory_format=torch.channels_last)


def test_quantized_weights_cannot_be_fused() -> None:
    pipe, _, facts = prepared("flux")
    applied = apply_settings(pipe, {"quantization": "transformer=int8wo"}, "cpu", facts)
    try:
        assert knob("fuse_qkv").refuse(True, context(read_facts(pipe))) is not None
        with pytest.raises(NotImplementedError):
            pipe.transformer.fuse_qkv_projections()
    finally:
        applied.undo()


def test_quantized_weights_cannot_go_to_disk() -> None:
    pipe, _, facts = prepared("flux")
    before = Snapshot.of(pipe, checksums=True)
    applied = apply_settings(pipe, {"quantization": "transformer=int8wo"}, "cpu", facts)
    tried = site("flux", offload_disk=True)
    with pytest.raises((ValueError, RuntimeError, TypeError)):
        live_offload_module.group(tried, "group_leaf")
    for undo in reversed(tried.started):  # as the transaction does when a change raises
        undo()
    applied.undo()
    assert_untouched("flux", before)


def test_float8_storage_breaks_text_encoders() -> None:
    """diffusers' own call does not exist there; its general hook makes T5 fail."""
    from diffusers.hooks import apply_layerwise_casting

    pipe = FAMILIES["flux"].build()
    facts = read_facts(pipe)
    assert knob("quantization").refuse("text_encoder_2=fp8_layerwise", context(facts)) is not None
    apply_layerwise_casting(pipe.text_encoder_2, torch.float8_e4m3fn, torch.float32)
    with pytest.raises(RuntimeError):
        FAMILIES["flux"].run(pipe)


def test_model_offload_and_group_offload_exclude_each_other() -> None:
    pipe, _, _ = prepared("flux")
    undo = live_offload_module.group(site("flux"), "group_leaf")
    try:
        now = read_facts(pipe)
        assert now.offload == "group_leaf"
        assert all(knob("offload").refuse(value, context(now, "sim")) for value in ("model", "sequential", "group_block"))
        assert "already runs under group_leaf" in str(knob("dtype").refuse("bf16", context(now, "sim")))
        pipe.to(torch.bfloat16)  # says nothing, and passes over what is offloaded
        assert pipe.transformer.dtype == torch.float32
        for enable in (pipe.enable_model_cpu_offload, pipe.enable_sequential_cpu_offload):
            with pytest.raises(ValueError, match="group offload"):
                enable(device="sim:0")
    finally:
        undo()


def test_processors_set_after_fusing_take_the_fusion_away() -> None:
    pipe, _, facts = prepared("sd15")
    applied = apply_settings(pipe, {"fuse_qkv": True}, "cpu", facts)
    pipe.enable_attention_slicing()
    fused = [type(part).__name__ for part in pipe.unet.attn_processors.values()]
    applied.undo()
    assert not any("Fused" in name for name in fused)


def test_a_cache_without_its_context_fails() -> None:
    pipe = FAMILIES["flux_kontext"].build()
    facts = read_facts(pipe)
    assert not facts.opens_cache_context
    assert "cache_context" in str(knob("cache").refuse("first_block", context(facts)))
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig())
    with pytest.raises(ValueError, match="cache context"):
        FAMILIES["flux_kontext"].run(pipe)

def test_a_cast_passes_over_quantized_weights_and_breaks_float8_storage() -> None:
    pipe = FAMILIES["flux"].build()
    facts = read_facts(pipe)
    applied = apply_settings(pipe, {"quantization": "transformer=int8wo"}, "cpu", facts)
    assert "already quantized" in str(knob("dtype").refuse("bf16", context(read_facts(pipe))))
    pipe.transformer.to(torch.bfloat16)
    kinds = {type(weight.data).__module__.split(".")[0] for weight in pipe.transformer.parameters()}
    assert kinds == {"torch", "torchao"}
    with pytest.raises(ApplyError):  # the cast cannot be undone: that is why it comes first
        applied.undo()
    pipe = FAMILIES["flux"].build()
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    pipe.to(torch.bfloat16)
    with pytest.raises(RuntimeError):
        FAMILIES["flux"].run(pipe)


def test_float8_storage_of_quantized_weights_saves_nothing() -> None:
    pipe = FAMILIES["flux"].build()
    apply_settings(pipe, {"quantization": "transformer=int8wo"}, "cpu", read_facts(pipe))
    assert "already quantized" in str(knob("quantization").refuse("transformer=fp8_layerwise", context(read_facts(pipe))))
    linears = [part for part in pipe.transformer.modules() if isinstance(part, torch.nn.Linear)]
    before = [own_bytes(part.weight) for part in linears]
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert [own_bytes(part.weight) for part in linears] == before


def own_bytes(weight: torch.Tensor) -> int:
    inner = [getattr(weight, name) for name in weight.__tensor_flatten__()[0]] if hasattr(weight, "__tensor_flatten__") else [weight]
    return sum(each.nbytes for each in inner)


# --- compilers ------------------------------------------------------------------------------------------------------


def cast_layerwise(pipe: Any) -> None:
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def in_groups(kind: str) -> Callable[[Any], None]:
    def offload(pipe: Any) -> None:
        live_offload_module.group(Site(pipe=pipe, device="cpu", facts=read_facts(pipe), settings={}), kind)

    return offload


def in_sequence(pipe: Any) -> None:
    import accelerate

    accelerate.cpu_offload(pipe.transformer, torch.device("cpu"))


def cached(pipe: Any) -> None:
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig())


@pytest.fixture
def traced_only(monkeypatch: pytest.MonkeyPatch) -> Any:
    """torch.compile without code generation: what breaks a graph shows all the same."""
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **options: compiler(*args, **options, backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("prepare", [cast_layerwise, in_groups("group_leaf"), in_groups("group_block"), in_sequence, cached],
                         ids=["fp8_layerwise", "group_leaf", "group_block", "sequential", "cache"])  # fmt: skip
@pytest.mark.usefixtures("traced_only")
def test_hooks_inside_a_block_break_its_graph(prepare: Callable[[Any], None]) -> None:
    pipe = FAMILIES["flux"].build()
    prepare(pipe)
    pipe.transformer.compile_repeated_blocks(fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        FAMILIES["flux"].run(pipe)


@pytest.mark.slow
@pytest.mark.usefixtures("traced_only")
def test_what_is_forbidden_with_regional_compilation_breaks_at_most_layers() -> None:
    """Group offload by blocks, which is allowed, breaks around a block; by leaves, one by one, or cast, at most of its layers."""
    found = {}
    hooks = {"group_block": in_groups("group_block"), "group_leaf": in_groups("group_leaf"), "sequential": in_sequence,
             "cast": cast_layerwise}  # fmt: skip
    for name, prepare in hooks.items():
        torch._dynamo.reset()
        counters.clear()
        pipe = FAMILIES["flux"].build()
        prepare(pipe)
        block = pipe.transformer.transformer_blocks[0]
        block.compile()
        with torch._dynamo.config.patch(recompile_limit=1):
            FAMILIES["flux"].run(pipe)
        found[name] = sum(counters["graph_break"].values())
    allowed = {name for name in hooks if conflict_between("compile", "regional", "offload", name) is None} - {"cast"}
    assert allowed == {"group_block"}
    assert min(count for name, count in found.items() if name not in allowed) >= 4 * found["group_block"]
    chosen: dict[str, KnobValue] = {"compile": "regional", "quantization": "transformer=fp8_layerwise"}
    assert any("graph breaks" in why for _, _, why, _ in violations(chosen, context(prepared("flux")[2])))
