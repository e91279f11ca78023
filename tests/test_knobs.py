"""Knobs as rules: values, refusals, conflicts, normal forms and plain code. No torch, no pipeline: facts only."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.errors import UsageError
from planner.facts import ComponentFacts, PipelineFacts
from planner.knobs import (
    KNOBS,
    Context,
    conflict_between,
    defaults,
    knob,
    normalize,
    parse_setting,
    to_python,
    violations,
)
from planner.knobs.offload import group_type
from planner.recipe import Recipe
from planner.types import Device, KnobValue, Workload

USABLE = {"inductor": None, "torchao": None, "mslk": None, "xformers": None, "flash": None, "sage": None}
UNET = ComponentFacts(
    name="unet", class_name="UNet2DConditionModel", library="diffusers", role="denoiser", dtype="fp16",
    parameters=100, weight_bytes=200, linear_parameters=40, convolutions_2d=3, has_attention_slice=True,
    attention_dispatcher=(0, 8), attention_processors=("AttnProcessor2_0",), attention_head_dims=(40,),
    repeated_blocks=("BasicTransformerBlock",), block_paths=("down_blocks.0", "up_blocks.0", "up_blocks.1"),
    can_fuse_qkv=True, can_cast_layerwise=True,
)  # fmt: skip
DIT = ComponentFacts(
    name="transformer", class_name="FluxTransformer2DModel", library="diffusers", role="denoiser", dtype="bf16",
    parameters=100, weight_bytes=200, linear_parameters=90, attention_dispatcher=(4, 4),
    attention_processors=("FluxAttnProcessor",), attention_head_dims=(128,), can_cache=True, can_cast_layerwise=True,
    repeated_blocks=("FluxTransformerBlock",), block_paths=("transformer_blocks.0", "transformer_blocks.1"),
)  # fmt: skip
VAE = ComponentFacts(
    name="vae", class_name="AutoencoderKL", library="diffusers", role="vae", dtype="fp16", parameters=10,
    weight_bytes=20, convolutions_2d=9, has_tiling=True, has_slicing=True, tile_pixels=1024,
    group_block_modules=("encoder", "decoder"), block_paths=("decoder.up_blocks.0",), can_cast_layerwise=True,
)  # fmt: skip
T5 = ComponentFacts(
    name="text_encoder", class_name="T5EncoderModel", library="transformers", role="text_encoder", dtype="fp16",
    parameters=50, weight_bytes=100, linear_parameters=45, keep_in_fp32=("wo",), tied_weights=True,
)  # fmt: skip


def pipeline(*components: ComponentFacts, **changes: Any) -> PipelineFacts:
    facts: dict[str, Any] = {
        "class_name": "AnyPipeline", "components": components, "dtype": "fp16",
        "offload_sequence": ("text_encoder", "unet", "transformer", "vae"),
        "batch_argument": "num_images_per_prompt", "default_steps": 50, "scheduler": "DDIMScheduler", "inspects_scheduler": True,
        "scheduler_compatibles": ("DDIMScheduler", "DPMSolverMultistepScheduler"),
    }  # fmt: skip
    return PipelineFacts(**(facts | changes))


SD = pipeline(T5, UNET, VAE)
FLUX = pipeline(T5, DIT, VAE, dtype="bf16", opens_cache_context=True, has_current_timestep=True)


def device(kind: str = "cuda", capability: tuple[int, int] | None = (8, 9)) -> Device:
    return Device(
        name=f"some {kind}", kind=kind, architecture="any", total_bytes=1 << 34, basis="assumed",  # type: ignore[arg-type]
        compute_capability=capability if kind == "cuda" else None, flops_per_second={"fp32": 1e12},
        bandwidth_bytes_per_second=1e11,
    )  # fmt: skip


def context(facts: PipelineFacts = SD, on: Device | None = None, batch: int = 4, **workload: Any) -> Context:
    return Context(facts=facts, device=on or device(), workload=Workload(batch_size=batch, **workload), quality="lossy", usable=USABLE)


CONTEXTS = {
    f"{name}-{where.kind}-{where.compute_capability}": context(facts, where)
    for name, facts in {"sd": SD, "flux": FLUX}.items()
    for where in (device(), device(capability=(7, 5)), device("cpu"), device("sim"))
}


def reasons(settings: dict[str, KnobValue], where: Context) -> str:
    return "; ".join(f"{name}={value}: {reason}" for name, value, reason, _ in violations(settings, where))


@st.composite
def chosen(draw: st.DrawFn) -> tuple[Context, dict[str, KnobValue]]:
    where = CONTEXTS[draw(st.sampled_from(sorted(CONTEXTS)))]
    names = draw(st.lists(st.sampled_from([each.name for each in KNOBS]), unique=True))
    return where, {name: draw(st.sampled_from(knob(name).values(where))) for name in names}


@pytest.mark.parametrize("where", CONTEXTS.values(), ids=CONTEXTS)
def test_defaults_leave_the_pipeline_alone_and_break_no_rule(where: Context) -> None:
    settings = defaults(where)
    assert violations(settings, where) == []
    recipe = Recipe()
    for each in KNOBS:
        recipe = each.shape(recipe, settings[each.name], where)
        assert each.quality(settings[each.name], where) == "exact"
    assert recipe == Recipe(vae_slicing=False, vae_tiling=False)


@pytest.mark.parametrize("where", CONTEXTS.values(), ids=CONTEXTS)
@pytest.mark.parametrize("each", KNOBS, ids=lambda each: each.name)
def test_offered_values_are_canonical_distinct_and_not_refused(each: Any, where: Context) -> None:
    values = each.values(where)
    assert values
    assert len(set(values)) == len(values)
    for value in values:
        assert each.check(value) == value
        assert each.refuse(value, where) is None
        assert parse_setting(f"{each.name}={value}") == (each.name, value)


@given(chosen())
def test_normal_form_is_complete_and_stable(choice: tuple[Context, dict[str, KnobValue]]) -> None:
    where, settings = choice
    full = normalize(settings, where)
    assert list(full) == [each.name for each in KNOBS]
    assert normalize(full, where) == full


@given(chosen(), st.randoms())
def test_order_of_settings_changes_nothing(choice: tuple[Context, dict[str, KnobValue]], random: Any) -> None:
    where, settings = choice
    items = list(settings.items())
    random.shuffle(items)
    assert normalize(dict(items), where) == normalize(settings, where)
    assert violations(dict(items), where) == violations(settings, where)
    assert to_python(dict(items), where) == to_python(settings, where)


@given(chosen())
def test_a_conflict_is_a_conflict_from_both_sides(choice: tuple[Context, dict[str, KnobValue]]) -> None:
    where, settings = choice
    full = normalize(settings, where)
    for each in KNOBS:
        for fixed in each.conflicts:
            here, there = full[each.name], full[fixed.other]
            if here in fixed.values and there in fixed.other_values:
                assert conflict_between(each.name, here, fixed.other, there) is not None
                assert conflict_between(fixed.other, there, each.name, here) is not None


@pytest.mark.parametrize("each", KNOBS, ids=lambda each: each.name)
def test_conflicts_name_known_knobs_and_values_and_their_source(each: Any) -> None:
    for fixed in each.conflicts:
        assert all(each.check(value) == value for value in fixed.values)
        assert all(knob(fixed.other).check(value) == value for value in fixed.other_values)
        assert fixed.reason
        assert fixed.source


def test_generated_code_is_python() -> None:
    for where in CONTEXTS.values():
        for each in KNOBS:
            for value in each.values(where):
                compile("\n".join(to_python({each.name: value}, where)), each.name, "exec")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("offload=model", ("offload", "model")),
        (" vae_tiling = yes", ("vae_tiling", True)),
        ("vae_slicing=0", ("vae_slicing", False)),
        ("batch_split=4", ("batch_split", 4)),
        ("attention=cudnn", ("attention", "_native_cudnn")),
        ("quantization=unet=int8wo, text_encoder=fp8wo", ("quantization", "text_encoder=fp8wo,unet=int8wo")),
    ],
)
def test_settings_are_read_as_users_write_them(text: str, expected: tuple[str, KnobValue]) -> None:
    assert parse_setting(text) == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ofload=model", "did you mean offload"),
        ("offload=modle", "did you mean model"),
        ("offload", "KNOB=VALUE"),
        ("offload=", "KNOB=VALUE"),
        ("batch_split=0", "at least 1"),
        ("batch_split=two", "whole number"),
        ("vae_tiling=maybe", "true or false"),
        ("quantization=unet", "COMPONENT=SCHEME"),
        ("quantization=unet=int8wo,unet=fp8wo", "once per component"),
        ("quantization=unet=int9", "did you mean int"),
        ("scheduler=os.system('x')", "name of a diffusers scheduler"),
    ],
)
def test_bad_settings_say_what_was_meant(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said.replace("(", r"\(")):
        parse_setting(text)


@pytest.mark.parametrize(
    ("settings", "where", "said"),
    [
        ({"dtype": "fp16"}, context(FLUX), "diffusers#9097"),
        ({"dtype": "bf16"}, context(SD, device(capability=(7, 5))), "compute capability 8.0"),
        ({"dtype": "fp16"}, context(FLUX, device("cpu")), "float16 on a CPU"),
        ({"offload": "model"}, context(SD, device("cpu")), "on the CPU"),
        ({"offload": "model"}, context(pipeline(UNET, offload_sequence=())), "model_cpu_offload_seq"),
        ({"offload": "none"}, context(pipeline(UNET, offload="model")), "remove its hooks"),
        ({"attention": "vanilla"}, context(FLUX), "plain counterpart"),
        ({"attention": "sliced"}, context(FLUX), "set_attention_slice"),
        ({"attention": "flash"}, context(SD), "attention dispatcher"),
        ({"attention": "_native_flash"}, context(FLUX, device(capability=(7, 5))), "8.0"),
        ({"attention": "_flash_3"}, context(FLUX), "needs compute capability 9.0"),
        ({"attention": "flash_hub"}, context(FLUX), "unknown"),
        ({"tf32": True, "dtype": "fp32"}, context(SD, device(capability=(7, 5))), "TF32"),
        ({"compile": "default"}, context(SD, device("sim")), "simulated"),
        ({"compile": "max-autotune"}, context(SD, device("cpu")), "equals default"),
        ({"batch_split": 3}, context(SD, batch=4), "does not split"),
        ({"batch_split": 2}, context(pipeline(UNET, batch_argument=None)), "no argument"),
        ({"channels_last": True}, context(pipeline(DIT)), "no convolutions"),
        ({"cache": "first_block"}, context(SD), "enable_cache"),
        ({"cache": "first_block"}, context(FLUX.model_copy(update={"opens_cache_context": False})), "cache_context"),
        ({"cache": "mag"}, context(FLUX), "magnitude ratios"),
        ({"quantization": "unet=fp8dq"}, context(SD, device(capability=(8, 6))), "8.9"),
        ({"quantization": "text_encoder=fp8_layerwise"}, context(SD), "diffusers#10347"),
        ({"quantization": "transformer=int8wo"}, context(SD), "no component 'transformer'"),
        ({"vae_tiling": True}, context(pipeline(UNET)), "no VAE"),
        ({"vae_tile": 700}, context(SD), None),  # settled away: tiling is off
        ({"vae_tiling": True, "vae_tile": 700}, context(SD), "no simple fraction"),
        ({"scheduler": "DPMSolverMultistepScheduler"}, context(pipeline(UNET, inspects_scheduler=False)), "may not take"),
        ({"scheduler": "EDMEulerScheduler"}, context(SD), "not among"),
        ({"steps": 60}, context(SD), "more than the 50 planned"),
        ({"offload": "sequential", "offload_keep": "text_encoder_9"}, context(SD), "no component 'text_encoder_9'"),
        ({"offload": "sequential", "offload_keep": "unet"}, context(SD), "nothing is left"),
        ({"offload_keep": "unet"}, context(SD), None),  # settled away: nothing is offloaded
        ({"offload": "group_leaf", "offload_stream": True}, context(SD, device("sim")), "streams"),
    ],
)
def test_what_cannot_work_is_refused_with_its_reason(settings: dict[str, KnobValue], where: Context, said: str | None) -> None:
    found = reasons(settings, where)
    assert (said in found) if said else found == ""


@pytest.mark.parametrize(
    ("settings", "where", "said"),
    [
        ({"attention": "flash", "dtype": "fp32"}, context(FLUX), "float16 and bfloat16 only"),
        ({"compile": "default", "offload": "sequential"}, context(SD), "pointless"),
        ({"compile": "default", "offload": "group_block"}, context(SD), "use regional"),
        ({"compile": "reduce-overhead", "offload": "model"}, context(SD), "fails"),
        ({"compile": "default", "quantization": "unet=fp8_layerwise"}, context(SD), "pointless"),
        ({"attention": "sliced", "fuse_qkv": True}, context(SD), "fused one away"),
        (
            {"offload": "group_leaf", "offload_disk": True, "quantization": "unet=int8wo"},
            context(SD),
            "safetensors files cannot hold",
        ),
        ({"steps": 25}, context(SD), "lose image quality"),
        ({"offload": "model", "offload_keep": "vae"}, context(SD), "as many copies, more memory"),
    ],
)
def test_values_that_cannot_be_combined(settings: dict[str, KnobValue], where: Context, said: str) -> None:
    assert said in reasons(settings, where)
    for name in settings:
        alone = {key: value for key, value in settings.items() if key != name}
        assert said not in reasons(alone, where)


@pytest.mark.parametrize(
    "settings",
    [
        {"compile": "regional", "offload": "group_block"},
        {"compile": "default", "offload": "model"},
        {"compile": "regional", "offload": "model", "quantization": "unet=int8wo"},
        {"attention": "sliced", "offload": "sequential", "vae_tiling": True, "channels_last": True},
        {"steps": 25, "scheduler": "DPMSolverMultistepScheduler"},
        {"offload": "group_leaf", "offload_stream": True, "quantization": "unet=fp8_layerwise"},
    ],
)
def test_combinations_that_work_are_not_forbidden(settings: dict[str, KnobValue]) -> None:
    assert reasons(settings, context(SD)) == ""


def test_options_without_effect_settle_to_their_defaults() -> None:
    idle = {"offload": "model", "offload_stream": True, "offload_blocks": 4, "offload_disk": True, "vae_tile": 512}
    full = normalize(idle, context(SD))
    assert (full["offload_stream"], full["offload_blocks"], full["offload_disk"]) == (False, 1, False)
    assert full["vae_tile"] == 1024
    streamed = normalize({"offload": "group_block", "offload_stream": True, "offload_blocks": 4}, context(SD))
    assert (streamed["offload_stream"], streamed["offload_blocks"]) == (True, 1)
    assert normalize({"tf32": True}, context(SD))["tf32"] is False
    assert normalize({"steps": 50}, context(SD))["steps"] == 0
    assert normalize({"scheduler": "DDIMScheduler"}, context(SD))["scheduler"] == "as_is"


def test_values_follow_the_workload() -> None:
    assert knob("batch_split").values(context(batch=12)) == (1, 2, 3, 4, 6, 12)
    assert knob("batch_split").values(context(batch=1)) == (1,)
    assert knob("vae_slicing").values(context(batch=1)) == (False,)
    assert knob("vae_slicing").values(context(batch=2)) == (False, True)
    assert knob("vae_tile").values(context()) == (1024, 512, 256, 128)
    assert knob("steps").values(context(num_inference_steps=20)) == (0,)
    assert knob("steps").values(context()) == (0, 25)
    assert knob("offload_blocks").values(context()) == (1, 2)
    assert knob("offload").values(context(on=device("cpu"))) == ("none",)
    assert knob("offload_keep").values(context(on=device("cpu"))) == ("none",)
    assert knob("offload_keep").values(context()) == ("none", "vae", "text_encoder", "text_encoder,vae")
    assert knob("offload").values(context()) == ("none", "model", "sequential", "group_block", "group_leaf")


def test_recipes_say_what_changes_physically() -> None:
    where, empty = context(), Recipe()

    def shaped(name: str, value: KnobValue) -> Recipe:
        return knob(name).shape(empty, value, where)

    assert shaped("attention", "vanilla").attention == "vanilla"
    assert shaped("attention", "xformers").attention == "efficient"
    assert shaped("attention", "_native_math").attention == "math"
    assert shaped("attention", "flash").attention == "flash"
    assert shaped("batch_split", 4).calls == 4
    assert shaped("dtype", "fp16") == empty
    assert shaped("dtype", "fp32").dtype == "fp32"
    assert shaped("steps", 25).steps_factor == 0.5
    assert shaped("quantization", "unet=int8wo").weights == {"unet": "int8wo"}
    assert shaped("compile", "regional").fusion == "regional"
    assert shaped("compile", "max-autotune") == empty.but(fusion="whole", cuda_graphs=True, autotuned=True)
    unsupported = UNET.model_copy(update={"supports_group_offloading": False})
    assert knob("offload").shape(empty, "group_leaf", context(pipeline(unsupported, VAE))).resident == {"unet"}


def test_group_offload_goes_by_leaves_where_blocks_would_break() -> None:
    bare_vae = VAE.model_copy(update={"group_block_modules": ()})
    assert group_type(UNET, "group_block") == "block_level"
    assert group_type(VAE, "group_block") == "block_level"
    assert group_type(bare_vae, "group_block") == "leaf_level"
    assert group_type(T5, "group_block") == "leaf_level"
    assert group_type(UNET, "group_leaf") == "leaf_level"


def test_compile_is_applied_before_model_offload_and_after_group_offload() -> None:
    compile_, offload = knob("compile"), knob("offload")
    assert compile_.order({"offload": "model"}) < offload.order({"offload": "model"})
    assert compile_.order({"offload": "group_block"}) > offload.order({"offload": "group_block"})
    stages = [each.stage for each in KNOBS]
    assert stages == sorted(stages)
    order = ["dtype", "fuse_qkv", "quantization", "channels_last", "attention", "compile", "offload", "cache"]
    assert [each.name for each in KNOBS if each.name in order] == order


def test_plain_code_of_group_offload_names_every_component() -> None:
    lines = to_python({"offload": "group_block", "offload_blocks": 2, "offload_disk": True}, context())
    assert [line.split("(")[1].split(",")[0] for line in lines] == ["pipe.text_encoder", "pipe.unet", "pipe.vae"]
    assert "num_blocks_per_group=2" in lines[1]
    assert "offload_to_disk_path" not in lines[0]  # tied weights stay in memory
    assert "offload_to_disk_path" in lines[1]


def test_plain_code_keeps_components_on_the_device() -> None:
    lines = to_python({"offload": "group_leaf", "offload_keep": "vae, text_encoder"}, context())
    assert [line for line in lines if ".to(" in line] == ['pipe.text_encoder.to("cuda")', 'pipe.vae.to("cuda")']
    excluded, enabled = to_python({"offload": "sequential", "offload_keep": "vae"}, context())
    assert excluded == "pipe._exclude_from_cpu_offload = [*pipe._exclude_from_cpu_offload, 'vae']"
    assert enabled.startswith("pipe.enable_sequential_cpu_offload")


def test_of_many_encoders_the_smallest_are_kept_together() -> None:
    encoders = [T5.model_copy(update={"name": f"text_encoder_{number}", "weight_bytes": 1000 - number}) for number in range(4)]
    values = knob("offload_keep").values(context(pipeline(UNET, *encoders)))
    assert values == ("none", "text_encoder_3", "text_encoder_2,text_encoder_3", "text_encoder_1,text_encoder_2,text_encoder_3",
                      "text_encoder_0,text_encoder_1,text_encoder_2,text_encoder_3")  # fmt: skip


def test_every_conflict_that_depends_on_other_settings_is_declared() -> None:
    """The public table is made from the declarations."""
    for where in CONTEXTS.values():
        for each in KNOBS:
            others: dict[str, KnobValue] = {"quantization": "unet=fp8_layerwise", "cache": "first_block", "offload": "model"}
            found = {each.clash(value, others, where) for value in each.values(where)}
            assert found <= {None, *each.conditional, *each.conflicts}


def test_keeping_float32_parts_is_written_out() -> None:
    text = "\n".join(to_python({"dtype": "fp16"}, context(SD.model_copy(update={"dtype": "fp32"}))))
    assert "{'wo'}" in text
    assert "pipe.unet.to(torch.float16)" in text


def test_rules_need_no_torch() -> None:
    code = "import sys, planner.knobs; assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
