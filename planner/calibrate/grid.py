"""The shapes that the device probes time, written as operation signatures so that one probe and one fit serve all."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from planner.calibrate.signature import variant_signature

_Sizes = tuple[tuple[int, ...], ...]
_CPU_MATMUL: _Sizes = ((512, 512, 512), (1024, 640, 640), (2, 1280, 1280), (4096, 320, 320), (1024, 2048, 1024))
_CPU_CONVOLUTION: _Sizes = ((2, 64, 64, 32, 3), (1, 128, 128, 64, 3), (2, 160, 160, 32, 3), (2, 320, 160, 16, 1))
_CPU_ATTENTION: _Sizes = ((2, 8, 256, 40), (2, 8, 1024, 64), (1, 4, 1024, 128))
_CUDA_MATMUL: _Sizes = (
    (1024, 1024, 1024),
    (2048, 1280, 1280),
    (2, 1280, 1280),
    (8192, 640, 640),
    (4096, 3072, 3072),
    (4608, 12288, 3072),
    (8192, 8192, 8192),
)
_CUDA_CONVOLUTION: _Sizes = (
    (2, 320, 320, 64, 3),
    (2, 1280, 1280, 16, 3),
    (8, 640, 640, 32, 3),
    (1, 512, 512, 256, 3),
    (1, 128, 128, 1024, 3),
)
_CUDA_ATTENTION: _Sizes = ((2, 8, 4096, 40), (2, 10, 4096, 64), (2, 24, 1024, 64), (1, 24, 4608, 128), (16, 8, 1024, 80))
"""(m, n, k); (images, in, out channels, side, kernel side); (batch, heads, sequence, head dim): sizes of SD 1.x, SDXL, FLUX and VAEs."""
_COPY_BYTES = {"cpu": 128 << 20, "cuda": 1 << 30}


def probe_signatures(kind: str, dtypes: Sequence[str], quick: bool, memory_limit_bytes: int) -> tuple[str, ...]:
    """Signatures to time on a ``cpu`` or ``cuda`` device, the most telling first. Copies shrink to fit the memory limit."""
    copied = min(_COPY_BYTES[kind], memory_limit_bytes // 4)
    cut = slice(2) if quick else slice(None)  # the first two of each grid differ most
    cuda = kind == "cuda"
    counts = (64, 1 << 20) if quick else (64, 1 << 16, 1 << 20, 1 << 22)
    found = list(_bandwidth(copied))
    found += [pointwise_signature(count, dtype) for count in counts for dtype in dtypes]
    found += [matmul_signature(dtype, *size) for size in (_CUDA_MATMUL if cuda else _CPU_MATMUL)[cut] for dtype in dtypes]
    for size in (_CUDA_CONVOLUTION if cuda else _CPU_CONVOLUTION)[cut]:
        found += [text for dtype in dtypes for text in _both_formats(convolution_signature(dtype, *size))]
    found += [attention_signature(dtype, *size) for size in (_CUDA_ATTENTION if cuda else _CPU_ATTENTION)[cut] for dtype in dtypes]
    return tuple(found)


def cpu_peak_signatures() -> tuple[str, ...]:
    """What a CPU's peaks are read from: a large copy, and products in each dtype. About a second on two cores."""
    products = [matmul_signature(dtype, 1024, size, size) for dtype in ("fp32", "bf16") for size in (512, 1024)]
    return (copy_signature(1 << 24, "fp32"), *products)


def _bandwidth(size_bytes: int) -> Iterator[str]:
    """A copy and a sum of tensors larger than any cache."""
    yield copy_signature(max(size_bytes // 4, 1 << 20), "fp32")
    yield pointwise_signature(max(size_bytes // 8, 1 << 20), "fp32")


def _both_formats(text: str) -> tuple[str, str]:
    return text, variant_signature(text, "channels_last")


def _dense(*shape: int) -> list[int]:
    stride, out = 1, []
    for side in reversed(shape):
        out.append(stride)
        stride *= side
    return out[::-1]


def _tensor(dtype: str, *shape: int) -> dict[str, list[object]]:
    return {"t": [list(shape), _dense(*shape), dtype]}


def matmul_signature(dtype: str, m: int, n: int, k: int) -> str:
    """``addmm`` as ``nn.Linear`` calls it: the weight is (n, k) and transposed."""
    return json.dumps(["aten.addmm.default", [_tensor(dtype, n), _tensor(dtype, m, k), {"t": [[k, n], [1, k], dtype]}], {}])


def convolution_signature(dtype: str, images: int, channels: int, out_channels: int, side: int, kernel: int) -> str:
    """A square convolution of stride 1 that keeps the size."""
    pad = kernel // 2
    image, weight = _tensor(dtype, images, channels, side, side), _tensor(dtype, out_channels, channels, kernel, kernel)
    bias, steps = _tensor(dtype, out_channels), [[1, 1], [pad, pad], [1, 1]]
    return json.dumps(["aten.convolution.default", [image, weight, bias, *steps, False, [0, 0], 1], {}])


def attention_signature(dtype: str, batch: int, heads: int, sequence: int, width: int) -> str:
    """Self-attention on tensors as projections leave them: (batch, sequence, heads, width), transposed."""
    strides = [sequence * heads * width, width, heads * width, 1]
    one = {"t": [[batch, heads, sequence, width], strides, dtype]}
    return json.dumps(["attention", [one, one, one, None], {}])


def pointwise_signature(count: int, dtype: str) -> str:
    """A sum of two tensors: two reads and a write per element."""
    return json.dumps(["aten.add.Tensor", [_tensor(dtype, count), _tensor(dtype, count)], {}])


def copy_signature(count: int, dtype: str) -> str:
    """One read and one write per element, onto memory that is there already."""
    return json.dumps(["aten.copy_.default", [_tensor(dtype, count), _tensor(dtype, count)], {}])
