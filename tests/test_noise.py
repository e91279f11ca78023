"""The noise of a comparison: the same for one seed, whatever the dtype."""

from __future__ import annotations

import pytest
import torch

from planner.noise import one_noise_for_all_dtypes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3,), (4, 16), (1, 4, 64, 64)])
def test_sixteen_bits_draw_what_float32_draws(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    def draw(kind: torch.dtype) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(7), dtype=kind, device="cpu")

    with one_noise_for_all_dtypes():
        wide, narrow = draw(torch.float32), draw(dtype)
    assert narrow.dtype == dtype
    assert torch.equal(narrow, wide.to(dtype))
    assert torch.equal(wide, draw(torch.float32))


def test_torch_is_as_it_was_afterwards() -> None:
    before = torch.randn

    def fail() -> None:
        with one_noise_for_all_dtypes():
            assert torch.randn is not before
            raise LookupError

    with pytest.raises(LookupError):
        fail()
    assert torch.randn is before


def test_other_devices_and_given_tensors_are_left_alone() -> None:
    with one_noise_for_all_dtypes():
        assert torch.randn(2, 3, device="meta", dtype=torch.bfloat16).device.type == "meta"
        kept = torch.empty(4, dtype=torch.bfloat16)
        assert torch.randn(4, dtype=torch.bfloat16, out=kept) is kept
