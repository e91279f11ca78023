"""The simulated accelerator itself: counters by hand, limits, faults, and every zoo family under every strategy."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from tests import sim as simulator
from tests.sim.strategies import REFUSED, STRATEGIES
from tests.zoo import FAMILIES

# Two linear layers, float32. Bytes: weights 16*32*4 = 2048 and 32*8*4 = 1024, biases 32*4 = 128 and 8*4 = 32. On the
# device each storage takes a multiple of 512: 2048 + 512 + 1024 + 512 = 4096. Input 4*16*4 = 256, hidden 4*32*4 = 512
# and output 4*8*4 = 128 take 512 each, and all three live while the second layer runs: the peak is 4096 + 1536.
COPIED_BYTES, RESIDENT_BYTES, PEAK_BYTES = 2048 + 128 + 1024 + 32, 4096, 4096 + 3 * 512


def toy() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Linear(32, 8))


def test_counters_of_a_toy_module_by_hand(sim: Any) -> None:
    model, values = toy(), torch.ones(4, 16)
    with torch.no_grad():
        expected = model(values)
        model.to("sim")
        assert (sim.memory.used_bytes, sim.memory.h2d_bytes) == (RESIDENT_BYTES, COPIED_BYTES)
        output = model(values.to("sim"))
        assert sim.memory.peak_bytes == PEAK_BYTES
        assert sim.memory.h2d_bytes == COPIED_BYTES + 256
        assert sim.memory.d2h_bytes == 0
        assert torch.equal(output.cpu(), expected)
    assert sim.memory.d2h_bytes == 128
    del output
    model.to("cpu")
    assert sim.memory.used_bytes == 0
    assert sim.memory.d2h_bytes == 128 + COPIED_BYTES


def test_views_and_in_place_operations_cost_nothing(sim: Any) -> None:
    value = torch.zeros(256, device="sim")
    assert sim.memory.used_bytes == 1024
    views = (value.view(16, 16).t(), value[3:], value.add_(1).unsqueeze_(0))
    assert sim.memory.used_bytes == 1024
    assert value.shape == (1, 256)
    assert views[1].sum().item() == 253


def test_a_cast_on_the_device_allocates_and_copies_nothing_over_the_bus(sim: Any) -> None:
    value = torch.ones(1024, device="sim")
    copied = sim.memory.h2d_bytes
    half = value.half()
    assert (half.dtype, half.device.type) == (torch.float16, "sim")
    assert sim.memory.used_bytes == 4096 + 2048
    assert (sim.memory.h2d_bytes, sim.memory.d2h_bytes) == (copied, 0)


def test_moving_a_module_keeps_the_identity_of_its_parameters(sim: Any) -> None:
    model = toy()
    model[0].bias.note = "kept"
    before = [id(p) for p in model.parameters()]
    model.to("sim").half()
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("sim", torch.float16)}
    assert [id(p) for p in model.parameters()] == before
    assert model[0].bias.note == "kept"
    model.to("cpu", torch.float32)
    assert [id(p) for p in model.parameters()] == before
    assert type(model[0].weight) is torch.nn.Parameter


def test_tied_weights_are_resident_and_copied_once(sim: Any) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(16, 16, bias=False), torch.nn.Linear(16, 16, bias=False))
    model[1].weight = model[0].weight
    model.to("sim")
    assert model[1].weight is model[0].weight
    assert (sim.memory.used_bytes, sim.memory.h2d_bytes) == (1024, 1024)


def test_mixed_devices_are_refused_as_on_cuda(sim: Any) -> None:
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        torch.ones(3, device="sim") + torch.ones(3)
    assert (torch.ones(3, device="sim") * torch.tensor(2.0)).sum().item() == 6
    with pytest.raises((TypeError, RuntimeError)):
        torch.ones(3, device="sim").numpy()


@pytest.mark.parametrize(("make", "expected"), [
    (lambda: torch.tensor([1, 2], device="sim"), [1, 2]), (lambda: torch.arange(3, device="sim"), [0, 1, 2]),
    (lambda: torch.full((2,), 7, device="sim"), [7, 7]), (lambda: torch.as_tensor([1.5], device="sim"), [1.5]),
    (lambda: torch.linspace(0, 1, 3, device="sim"), [0, 0.5, 1]),
    (lambda: torch.zeros(1, device="sim").new_tensor([4.0]), [4.0]),
    (lambda: torch.Tensor([torch.ones((), device="sim")]).to("sim"), [1.0]),
    (lambda: torch.ones(1, 2, device="sim").squeeze_(0), [1.0, 1.0]),
])  # fmt: skip
def test_factories_make_tensors_on_the_device(sim: Any, make: Any, expected: list[float]) -> None:
    value = make()
    assert value.device == torch.device("sim", 0)
    assert value.tolist() == expected


def test_random_numbers_of_a_cpu_generator_are_the_cpus(sim: Any) -> None:
    from diffusers.utils.torch_utils import randn_tensor

    made = [randn_tensor((3,), generator=torch.Generator().manual_seed(1), device=torch.device(d)) for d in ("sim", "cpu")]
    assert made[0].device.type == "sim"
    assert torch.equal(made[0].cpu(), made[1])


def test_the_limit_holds_to_the_byte() -> None:
    values = torch.ones(4, 16)
    with simulator.active(PEAK_BYTES) as memory, torch.no_grad():
        model = toy().to("sim")
        model(values.to("sim"))
        assert memory.peak_bytes == PEAK_BYTES
        memory.total_bytes = PEAK_BYTES - 1
        with pytest.raises(torch.OutOfMemoryError, match=f"of {PEAK_BYTES - 1} bytes {PEAK_BYTES - 512} are in use"):
            model(values.to("sim"))
        assert memory.used_bytes == RESIDENT_BYTES, "what the failed call held is free again"


def test_injected_faults_fire_at_their_event_and_once(sim: Any) -> None:
    for event, number in ((sim.ALLOCATION, 3), (sim.COPY, 2)):
        fault = sim.Fault(event=event, number=number, error=sim.out_of_memory)
        model = toy()
        with sim.memory.faults(fault) as armed:
            with pytest.raises(torch.OutOfMemoryError, match="injected"):
                model.to("sim")
            assert armed.fired == [fault]
            moved = [p.device.type for p in model.parameters()].count("sim")
            assert moved == number - 1, "what moved before the fault stays where it is"
            model.to("sim")
        assert armed.fired == [fault]


def test_any_error_can_be_injected(sim: Any) -> None:
    fault = sim.Fault(event=sim.COPY, number=1, error=KeyboardInterrupt)
    with sim.memory.faults(fault), pytest.raises(KeyboardInterrupt):
        toy().to("sim")
    with pytest.raises(ValueError, match="wanted 'allocation' or 'copy'"):
        sim.Fault(event="launch", number=1, error=KeyboardInterrupt)


def test_another_process_takes_memory_in_the_middle() -> None:
    with simulator.active(8192) as memory:
        free_before, total = torch.sim.mem_get_info()
        assert (free_before, total) == (8192, 8192)
        steals = simulator.Fault(event=simulator.ALLOCATION, number=3, other_process_bytes=6000)
        with memory.faults(steals) as armed:
            with pytest.raises(torch.OutOfMemoryError, match="6000 by another process"):
                toy().to("sim")
            assert armed.fired == [steals]
            assert torch.sim.mem_get_info()[0] < 8192 - 6000 + 1
        assert memory.other_process_bytes == 0


def test_cached_blocks_count_as_reserved_until_given_back(sim: Any) -> None:
    value = torch.zeros(1024, device="sim")
    del value
    assert (torch.sim.memory_allocated(), torch.sim.memory_reserved()) == (0, 4096)
    torch.sim.empty_cache()
    assert torch.sim.memory_reserved() == 0


def rounded_weights(module: torch.nn.Module) -> int:
    tensors = {id(t): t for t in (*module.parameters(), *module.buffers())}
    return sum(simulator.rounded_bytes(t.nbytes) for t in tensors.values())


def test_phases_show_which_weights_model_offload_keeps(sim: Any) -> None:
    case = FAMILIES["sd15"]
    pipe = case.build()
    text, unet, vae = (rounded_weights(part) for part in (pipe.text_encoder, pipe.unet, pipe.vae))
    STRATEGIES["model"](pipe)
    with sim.phases(pipe) as phases:
        case.run(pipe)
    assert [(p.component, p.entry) for p in phases] == [
        ("text_encoder", "forward"), ("text_encoder", "forward"), ("unet", "forward"), ("unet", "forward"),
        ("vae", "decode")]  # fmt: skip
    assert [p.weight_bytes_before for p in phases] == [0, text, text, unet, unet]
    assert [p.weight_bytes_after for p in phases] == [text, text, unet, unet, vae]
    assert [p.peak_weight_bytes for p in phases] == [text, text, max(text, unet), unet, max(unet, vae)]


def test_leaf_offload_holds_one_leaf_at_a_time(sim: Any) -> None:
    case = FAMILIES["sd15"]
    pipe = case.build()
    leaves = [m for m in pipe.unet.modules() if not list(m.children())]
    largest = max(sum(simulator.rounded_bytes(p.nbytes) for p in leaf.parameters()) for leaf in leaves)
    STRATEGIES["group_leaf"](pipe)
    with sim.phases(pipe) as phases:
        case.run(pipe)
    assert {p.peak_weight_bytes for p in phases if p.component == "unet"} == {largest}


def test_streamed_offload_pins_every_weight_once_and_copies_none_back(sim: Any) -> None:
    case = FAMILIES["sd15"]
    pipe = case.build()
    unet_bytes = sum(p.nbytes for p in pipe.unet.parameters())
    pipe.unet.enable_group_offload(torch.device("sim", 0), torch.device("cpu"), "leaf_level", use_stream=True)
    assert sim.memory.pinned_bytes == unet_bytes
    assert sim.memory.d2h_bytes == 0


REFERENCE_TOLERANCE = 1e-5


@cache
def on_cpu(family: str) -> np.ndarray:
    case = FAMILIES[family]
    return case.run(case.build())


# One of each kind of denoiser and stage structure always runs; the whole matrix is the slow part.
QUICK = {"sd15", "sdxl", "flux", "wan22_t2v", "qwen_image", "audioldm2", "cascade_combined", "unclip"}
MATRIX = [
    pytest.param(family, strategy, marks=[] if family in QUICK and "stream" not in strategy else [pytest.mark.slow])
    for family, case in FAMILIES.items() if not case.slow for strategy in STRATEGIES
]  # fmt: skip


@pytest.mark.parametrize(("family", "strategy"), MATRIX)
def test_family_gives_the_cpus_output_under_strategy(sim: Any, family: str, strategy: str) -> None:
    expected = on_cpu(family)
    case = FAMILIES[family]
    pipe = case.build()
    refusal = REFUSED.get((family, strategy))
    if refusal is not None:
        with pytest.raises(refusal.error, match=refusal.message):
            run_under(pipe, strategy, case)
        return
    output = run_under(pipe, strategy, case)
    assert np.abs(output - expected).max() <= REFERENCE_TOLERANCE * max(1.0, np.abs(expected).max())
    assert sim.memory.h2d_bytes > 0, "nothing went to the device: the strategy did nothing"


def run_under(pipe: Any, strategy: str, case: Any) -> np.ndarray:
    STRATEGIES[strategy](pipe)
    output = case.run(pipe)
    assert pipe._execution_device.type == "sim"
    return output


def test_refusals_name_families_and_strategies_that_exist() -> None:
    assert {family for family, _ in REFUSED} <= set(FAMILIES)
    assert {strategy for _, strategy in REFUSED} <= set(STRATEGIES)


def test_half_the_memory_is_too_little_resident_and_enough_by_leaf() -> None:
    case = FAMILIES["qwen_image"]  # large weights, small activations
    total = sum(rounded_weights(m) for m in case.build().components.values() if isinstance(m, torch.nn.Module))
    for strategy, fits in (("none", False), ("group_leaf", True)):
        with simulator.active(total // 2):
            pipe = case.build()
            if fits:
                assert np.isfinite(run_under(pipe, strategy, case)).all()
            else:
                with pytest.raises(torch.OutOfMemoryError):
                    run_under(pipe, strategy, case)


def test_nothing_stays_patched_and_cpu_tensors_work_as_before(sim: Any) -> None:
    """Runs in its own process, where the first thing that happens is the simulator."""
    script = (
        "import torch\nfrom tests import sim\n"
        "before = torch.Tensor.data, torch.nn.functional.scaled_dot_product_attention\n"
        "with sim.active():\n    torch.nn.Linear(2, 2).to('sim')\n"
        "assert before == (torch.Tensor.data, torch.nn.functional.scaled_dot_product_attention)\n"
        "assert 'data' not in vars(torch.Tensor)\n"
        "p = torch.nn.Parameter(torch.ones(2)); p.data = torch.zeros(2)\n"
        "(p * 2).sum().backward(); assert p.grad.tolist() == [2, 2]\n"
        "print('fine')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "fine", done.stderr
