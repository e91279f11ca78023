"""The same noise for the same seed, whatever the dtype: what a comparison of two precisions needs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def one_noise_for_all_dtypes() -> Iterator[None]:
    """Inside, ``torch.randn`` draws 16-bit noise on the CPU in float32 and rounds it.

    torch 2.13 does so by itself. With torch 2.11 the same seed gives unrelated numbers in float32 and in 16 bits (16 and more of
    them; measured: mean difference 1.1, against 0.001 with 2.13), so that a picture in bfloat16 would be judged for its noise.
    The noise of other devices is left alone: their generators draw in float32 in every version.
    """
    import torch

    draw = torch.randn

    def rounded(*size: Any, **options: Any) -> Any:
        dtype, device = options.get("dtype"), torch.device(options.get("device") or torch.get_default_device())
        if dtype not in (torch.float16, torch.bfloat16) or device.type != "cpu" or "out" in options:
            return draw(*size, **options)
        return draw(*size, **options | {"dtype": torch.float32}).to(dtype)

    torch.randn = rounded
    try:
        yield
    finally:
        torch.randn = draw
