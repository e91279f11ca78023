"""Each memory term against numbers worked out by hand, on made-up operations; no torch, no model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest

from planner.cost.allocator import CachingAllocator, Script
from planner.cost.model import Cost, CostModel
from planner.cost.quantized import fused_bytes, leaf_bytes
from planner.cost.reserved import _tensors, lodged_bytes
from planner.cost.workspace import attention_bytes, convolution_bytes, operator_bytes, operator_pieces
from planner.dryrun.trace import DTYPE_CODES, CallTrace, Kind
from planner.facts import ComponentFacts, Leaf
from planner.hardware.profiles import device_from_profile, find_gpu
from planner.recipe import Recipe
from planner.units import MIB

COLUMNS = ("kind", "dtype", "read_bytes", "write_bytes", "param_bytes", "live_bytes", "new_bytes", "fused_read_bytes", "fused_write_bytes",
           "fused_live_bytes", "fused_head", "module", "shape", *(f"d{i}" for i in range(8)))  # fmt: skip


def one(kind: Kind, dtype: str, dims: tuple[int, ...], read: int = 0, write: int = 0, params: int = 0) -> CallTrace:
    """A call of one operation."""
    values = dict.fromkeys(COLUMNS, 0) | {"kind": int(kind), "dtype": DTYPE_CODES[dtype], "read_bytes": read, "write_bytes": write}
    values |= {"param_bytes": params, "times": 1} | {f"d{i}": size for i, size in enumerate(dims)}
    columns = {name: np.array([value], dtype=np.int64) for name, value in values.items()} | {"flops": np.zeros(1)}
    return CallTrace("vae", "decode", columns, ("",), ("x",), 0, 0)


def convolution(images: int, channels: int, out: int, side: int, dtype: str, size: int) -> CallTrace:
    pixels, weights = side * side, channels * out * 9 * size
    read, write = images * channels * pixels * size + weights, images * out * pixels * size
    return one(Kind.CONVOLUTION, dtype, (images, channels, pixels, out, 9, 1, 1, 2), read, write, weights)


def gpu(name: str):
    return device_from_profile(find_gpu(name)[0])


H100, T4 = gpu("H100"), gpu("T4")


@pytest.mark.parametrize(("images", "channels", "out", "copied_mib"), [
    (1, 256, 256, 512 + 512),    # FLUX decoder's last upsampling at 1024x1024: both copies
    (4, 256, 256, 4 * 512),      # from 2^38 output elements times channels on: the input's only
    (8, 256, 128, 8 * (512 + 256)),
    (16, 256, 128, 16 * 512),
])  # fmt: skip
def test_layout_copies_of_16_bit_convolutions(images: int, channels: int, out: int, copied_mib: int) -> None:
    call = convolution(images, channels, out, 1024, "bf16", 2)
    assert convolution_bytes(call, H100, Recipe()).tolist() == [copied_mib * MIB + channels * out * 9 * 2], "and the weight's copy"


def test_large_tf32_convolutions_copy_their_input_only_and_plain_fp32_nothing() -> None:
    call = convolution(1, 256, 256, 1024, "fp32", 4)
    assert convolution_bytes(call, H100, Recipe()).tolist() == [1024 * MIB + 256 * 256 * 9 * 4]
    assert convolution_bytes(call, H100, Recipe(), most=True).tolist() == [2048 * MIB + 256 * 256 * 9 * 4]
    assert convolution_bytes(call, T4, Recipe()).tolist() == [0], "Turing has no TF32"
    half = convolution(1, 256, 128, 1024, "fp32", 4)
    assert convolution_bytes(half, H100, Recipe()).tolist() == [(1024 + 512) * MIB + 256 * 128 * 9 * 4]


def test_volta_copies_no_output() -> None:
    call = convolution(1, 256, 256, 1024, "fp16", 2)
    volta = H100.model_copy(update={"compute_capability": (7, 0)})
    assert convolution_bytes(call, volta, Recipe()).tolist() == [512 * MIB + 256 * 256 * 9 * 2]
    assert convolution_bytes(call, volta, Recipe(), most=True).tolist() == convolution_bytes(call, H100, Recipe()).tolist()


def test_convolutions_over_frames_copy_their_output_at_any_size() -> None:
    flat = convolution(16, 256, 128, 1024, "bf16", 2)
    dims = (16, 256, 1024 * 1024, 128, 9, 1, 1, 3)
    frames = one(Kind.CONVOLUTION, "bf16", dims, int(flat.read_bytes[0]), int(flat.write_bytes[0]), int(flat.param_bytes[0]))
    output = 16 * 128 * 1024 * 1024 * 2
    assert convolution_bytes(frames, H100, Recipe()).tolist() == [int(convolution_bytes(flat, H100, Recipe())[0]) + output]


def test_without_tensor_cores_16_bit_convolutions_run_in_fp32_with_transformed_weights() -> None:
    """The last upsampling of a decoder at 512x512, and the convolution that sets SD 1.4's denoiser peak."""
    card = gpu("GTX 1070")
    last = convolution(1, 256, 256, 512, "fp16", 2)
    assert convolution_bytes(last, card, Recipe()).tolist() == [512 * MIB + 9 * MIB]
    deep = convolution(2, 2560, 1280, 16, "fp16", 2)
    assert convolution_bytes(deep, card, Recipe()).tolist() == [450 * MIB + 4 * 2 * 256 * (2560 + 1280)]
    assert convolution_bytes(convolution(1, 256, 256, 512, "fp32", 4), card, Recipe()).tolist() == [0]


def test_scores_and_probabilities_are_blocks_of_their_own() -> None:
    call = one(Kind.ATTENTION, "fp16", (2, 8, 4096, 4096, 40, 40, 0, 8))
    vanilla = Recipe(attention="vanilla")
    pieces = operator_pieces(call, H100, vanilla)
    assert sorted(int(piece[0]) for piece in pieces)[-2:] == [512 * MIB, 512 * MIB]
    assert sum(pieces).tolist() == operator_bytes(call, H100, vanilla).tolist()
    allocator = CachingAllocator()
    held = allocator.allocate(600 * MIB)
    allocator.free(held)
    Script.of(call, pieces).play(allocator)
    assert allocator.peak_reserved_bytes < (600 + 512 + 64) * MIB, "one of them lies in the block that was free"


def test_a_cached_score_matrix_may_be_lodged_in() -> None:
    """Published reserved bytes of one job differ by one such matrix; kernels that keep none have no such doubt."""
    call = one(Kind.ATTENTION, "fp16", (2, 8, 4096, 4096, 40, 40, 0, 8))
    cost = cast(Cost, SimpleNamespace(trace=None, phases=[SimpleNamespace(call=0)]))
    model = cast(CostModel, SimpleNamespace(device=H100, variant=lambda *_: call, role=lambda _: "denoiser"))
    assert lodged_bytes(model, Recipe(attention="vanilla"), cost) == 512 * MIB
    assert lodged_bytes(model, Recipe(), cost) == 0


@pytest.mark.parametrize(("names", "added"), [
    (("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"), 300),
    (("attn2.to_q", "attn2.to_k", "attn2.to_v"), 200),
    (("attn.to_q", "attn.to_k", "attn.to_v", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), 600),
])  # fmt: skip
def test_fused_projections_lie_beside_the_separate_ones(names: tuple[str, ...], added: int) -> None:
    leaves = tuple(Leaf(path=f"blocks.0.{name}", class_name="Linear", bytes=100, linear_weight_bytes=100) for name in names)
    part = ComponentFacts(name="transformer", class_name="X", library="diffusers", role="denoiser", dtype="bf16", parameters=50,
                          weight_bytes=100 * len(names), leaves=leaves, can_fuse_qkv=True)  # fmt: skip
    assert sum(fused_bytes(part, None)) == added
    assert sum(fused_bytes(part, "int8wo")) == added // 2
    assert fused_bytes(part.model_copy(update={"can_fuse_qkv": False}), None) == []


def test_channels_last_spares_the_output_copy() -> None:
    call = convolution(1, 256, 256, 1024, "bf16", 2)
    assert convolution_bytes(call, H100, Recipe(channels_last=True)).tolist() == [512 * MIB]


def test_score_matrices_and_the_rows_of_fused_kernels() -> None:
    call = one(Kind.ATTENTION, "fp16", (2, 8, 4096, 4096, 64, 64, 0, 8))
    scores, tensors = 2 * 8 * 4096 * 4096 * 2, 2 * 8 * 4096 * 64 * 2 * 3
    assert attention_bytes(call, H100, Recipe(attention="vanilla")).tolist() == [2 * scores + tensors]
    assert attention_bytes(call, H100, Recipe()).tolist() == [2 * 8 * 4096 * 4], "one fp32 row per query"
    assert attention_bytes(call, H100, Recipe(attention="sliced")).tolist()[0] < 2 * scores


def component(dtype: str = "bf16", **changes: object) -> ComponentFacts:
    leaves = (
        Leaf(path="shared", class_name="Embedding", bytes=2000),
        Leaf(path="block.0.norm1.linear", class_name="Linear", bytes=1200, linear_weight_bytes=1000),
        Leaf(path="block.0.ff", class_name="Linear", bytes=12800, linear_weight_bytes=12800),
        Leaf(path="block.0.wo", class_name="Linear", bytes=4000, linear_weight_bytes=4000),
    )
    return ComponentFacts(name="text_encoder", class_name="T5EncoderModel", library="transformers", role="text_encoder", dtype=dtype,
                          parameters=10000, weight_bytes=20000, leaves=leaves, **changes)  # fmt: skip


def test_stored_bytes_by_scheme() -> None:
    plain = component()
    assert leaf_bytes(plain, None) == [2000, 1200, 12800, 4000]
    assert leaf_bytes(plain, None, 2.0) == [4000, 2400, 25600, 8000]
    assert leaf_bytes(plain, "int8wo") == [2000, 200 + 500, 6400, 2000]
    assert leaf_bytes(plain, "int4wo") == [2000, 200 + 266, 3400, 1062], "half a byte and 4 bytes per 128 weights"
    assert leaf_bytes(plain, "nf4") == [2000, 200 + 281, 3600, 1125], "half a byte and 4 bytes per 64 weights"
    assert leaf_bytes(plain, "gguf_q8_0") == [2000, 200 + 531, 6800, 2125], "34 bytes per 32 weights"
    assert leaf_bytes(plain, "fp8_layerwise") == [2000, 1200, 6400, 2000], "norms and embeddings are left alone"


def test_what_the_model_keeps_in_fp32_is_not_quantized() -> None:
    kept = component(keep_in_fp32=("wo",))
    assert leaf_bytes(kept, "nf4")[3] == 8000
    assert leaf_bytes(kept, "llm_int8")[3] == 8000
    assert leaf_bytes(kept, "int8wo")[3] == 4000, "torchao's filter passes it by"
    assert leaf_bytes(kept, "quanto_int8")[3] == 2000
    half = component("fp16", keep_in_fp32=("wo",))  # loading in fp16 keeps it, so the facts already count 4 bytes each
    assert leaf_bytes(half, "int8wo")[3] == 4000
    assert leaf_bytes(half, "quanto_int8")[3] == 1000


def test_a_bias_is_a_tensor_of_its_own_and_a_shared_tensor_comes_once() -> None:
    assert list(_tensors(component(), "int8wo", 1.0)) == [(2000, 2000), (200, 200), (1000, 500), (12800, 6400), (4000, 2000)]
    tied = component().model_copy(update={"weight_bytes": 18000})  # two of the leaves hold the same 2000 bytes
    assert next(_tensors(tied, None, 1.0)) == (200, 200)


def test_weights_that_are_quantized_already_stay_as_they_are() -> None:
    assert leaf_bytes(component(quantization="torchao"), "int8wo") == [2000, 1200, 12800, 4000]
