"""Times operations and host costs on the device that is here. Interruptible, and bounded in time and memory."""

from __future__ import annotations

import logging
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from planner.calibrate.grid import probe_signatures
from planner.calibrate.rebuild import RandomTensors, rebuild
from planner.calibrate.samples import Rate, RateName, Run, Sample
from planner.calibrate.signature import Operation, cost_weight, parse_signature, weight_bytes
from planner.calibrate.store import now
from planner.calibrate.timing import time_repetitions
from planner.calibrate.tiny import TinyModel
from planner.progress import Progress, silent

logger = logging.getLogger(__name__)

QUICK_SECONDS, DEFAULT_SECONDS = 8.0, 50.0
"""Below the promised 10 and 60 seconds: the last operation may run over."""
_EACH_SECONDS = 0.15
"""Most time for one operation's repetitions beyond its first three."""
_COLD_BYTES = 64 << 20
_HOST_MEMORY_BYTES = 256 << 20
_MAX_COPIES = 8
_TOLD_EVERY_SECONDS = 1.0
_PYTHON_ROUNDS = 9
_EVICTED_BYTES = 4 << 20
"""Passed through between operations of the small model: more than the second-level cache of one core (1 to 2 MiB)."""


def probe_operations(
    shapes: Iterable[str] | Mapping[str, int],
    device: torch.device | str,
    budget_seconds: float,
    memory_limit_bytes: int,
    progress: Progress = silent,
) -> dict[str, Sample]:
    """Time each distinct operation once with random tensors, the ones that matter most first.

    ``shapes``: signatures, repeated as often as they occur, or signature to count. What the budget leaves no time for is
    absent; what cannot be made again or exceeds the memory limit is there with its reason in ``skipped``. Ctrl-C ends the
    probing and keeps what was measured.
    """
    return _probe_all(_by_weight(Counter(shapes)), torch.device(device), budget_seconds, memory_limit_bytes, progress)[0]


def _by_weight(counts: Mapping[str, int]) -> list[tuple[str, Operation | str]]:
    """Signatures by estimated total cost, parsed; in place of an operation the reason why it is none."""
    parsed: list[tuple[float, str, Operation | str]] = []
    for text, count in counts.items():
        try:
            operation = parse_signature(text)
            parsed.append((-cost_weight(operation) * count, text, operation))
        except ValueError as error:
            parsed.append((1.0, text, str(error)))
    return [(text, operation) for _, text, operation in sorted(parsed, key=lambda item: item[:2])]


def _probe_all(work: list[tuple[str, Operation | str]], device: torch.device, budget_seconds: float, memory_limit_bytes: int,
               progress: Progress) -> tuple[dict[str, Sample], bool]:  # fmt: skip
    """Samples, and whether all of the work was done."""
    random, found = RandomTensors(device), dict[str, Sample]()
    started, told = time.perf_counter(), 0.0
    try:
        for number, (text, operation) in enumerate(work):
            spent = time.perf_counter() - started
            if spent > budget_seconds:
                progress(f"probing stopped after {spent:.0f} s: {number} of {len(work)} operations timed")
                return found, False
            if spent - told > _TOLD_EVERY_SECONDS:
                progress(f"probing operation {number + 1} of {len(work)}, {max(budget_seconds - spent, 0):.0f} s left at most")
                told = spent
            found[text] = _probe_one(text, operation, random, memory_limit_bytes, min(_EACH_SECONDS, budget_seconds / 10))
    except KeyboardInterrupt:
        progress(f"probing interrupted: {len(found)} of {len(work)} operations timed are kept")
        return found, False
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return found, True


def _probe_one(text: str, operation: Operation | str, random: RandomTensors, memory_limit_bytes: int, each_seconds: float) -> Sample:
    threads = torch.get_num_threads()

    def skipped(reason: str) -> Sample:
        return Sample(signature=text[:16_384], threads=threads, skipped=reason[:300] or "unknown reason")

    if isinstance(operation, str):
        return skipped(operation)
    if operation.bytes > memory_limit_bytes:
        return skipped(f"needs {operation.bytes} bytes, more than the limit of {memory_limit_bytes}")
    try:
        runnable = rebuild(operation, random, _weight_copies(operation, memory_limit_bytes))
        return Sample(signature=text, threads=threads, repetitions=time_repetitions(runnable.run, random.device, each_seconds))
    except Exception as error:  # whatever an operation raises on made-up data, the others are still worth timing
        logger.debug("probe of %s failed", text, exc_info=True)
        return skipped(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")


def _weight_copies(operation: Operation, memory_limit_bytes: int) -> int:
    """How many weights to take turns with: in a model each is read once per call, so it is not in cache."""
    size = weight_bytes(operation)
    if size < 1 << 16:
        return 1
    spare = max(memory_limit_bytes - operation.bytes, 0)
    return 1 + min(_MAX_COPIES - 1, -(-_COLD_BYTES // size), spare // size)


def probe_device(device: torch.device | str, *, quick: bool, memory_limit_bytes: int, dtypes: tuple[str, ...],
                 progress: Progress = silent) -> Run:  # fmt: skip
    """Time the grid of shapes, and what the host costs. Interrupted or out of time: what there is, marked incomplete."""
    device = torch.device(device)
    TinyModel(torch.device("cpu"))  # importing diffusers takes seconds and is no probing
    started, limit = time.perf_counter(), QUICK_SECONDS if quick else DEFAULT_SECONDS
    rates, complete = _measure_host(device, memory_limit_bytes, progress)
    texts = probe_signatures(device.type, dtypes, quick, memory_limit_bytes)
    work: list[tuple[str, Operation | str]] = [(text, parse_signature(text)) for text in texts]
    left = limit - (time.perf_counter() - started)
    samples, done = _probe_all(work, device, left, memory_limit_bytes, progress) if complete else ({}, False)
    return _run(quick, complete and done, tuple(samples.values()), rates)


def probe_host(device: torch.device | str, progress: Progress = silent) -> Run:
    """Only what the host adds to operations; about two seconds."""
    rates, _ = _measure_host(torch.device(device), _HOST_MEMORY_BYTES, progress)
    return _run(True, False, (), rates)


def _measure_host(device: torch.device, memory_limit_bytes: int, progress: Progress) -> tuple[list[Rate], bool]:
    """Host and link rates, and whether nobody interrupted."""
    rates: list[Rate] = []
    try:
        for name, measure in host_probes(device, memory_limit_bytes).items():
            progress(f"probing {name.replace('_', ' ')}")
            rates += measure()
    except KeyboardInterrupt:
        progress(f"probing interrupted: {len(rates)} rates are kept")
        return rates, False
    return rates, True


def _run(quick: bool, complete: bool, samples: tuple[Sample, ...], rates: list[Rate]) -> Run:
    date = now()
    identity = f"{date}-{time.time_ns() % 10**9:09d}"
    return Run(id=identity, date=date, quick=quick, complete=complete, threads=torch.get_num_threads(), samples=samples, rates=tuple(rates))


def host_probes(device: torch.device, memory_limit_bytes: int) -> dict[str, Any]:
    """Name to a measurement of host costs that gives rates."""
    size = int(min(256 << 20, max(memory_limit_bytes // 4, 1 << 20)))
    probes: dict[str, Any] = {"launch overhead": lambda: launch_rates(device), "picture conversion": lambda: [picture_rate()]}
    if device.type == "cpu":
        probes["fresh memory"] = lambda: [fresh_memory_rate(size)]
    if device.type == "cuda":
        probes["copies"] = lambda: copy_rates(device, size)
    return probes


def _rate(name: RateName, units: float, repetitions: tuple[float, ...]) -> Rate:
    return Rate(name=name, units=units, repetitions=repetitions, threads=torch.get_num_threads())


def picture_rate() -> Rate:
    """Float images to pictures as pipelines do it: scale, round, 8 bit, PIL. Units are float bytes."""
    import numpy as np
    from PIL import Image

    images = np.random.default_rng(0).random((2, 512, 512, 3), dtype=np.float32)

    def convert(repetition: int) -> Any:
        return [Image.fromarray(image) for image in (images * 255).round().astype("uint8")]

    return _rate("picture", images.nbytes, time_repetitions(convert, torch.device("cpu"), 0.05))


def fresh_memory_rate(size_bytes: int) -> Rate:
    """What first use of memory costs beyond writing it: the kernel maps and clears pages. Units are bytes."""
    size_bytes = max(size_bytes, 40 << 20)  # above 32 MiB glibc gives every block back when it is freed (mallopt(3))
    kept = torch.empty(size_bytes, dtype=torch.uint8)
    again = time_repetitions(lambda _: kept.fill_(1), torch.device("cpu"), 0.2)
    fresh = time_repetitions(lambda _: torch.empty(size_bytes, dtype=torch.uint8).fill_(1), torch.device("cpu"), 0.4)
    usual = _median(again)
    return _rate("fresh_memory", size_bytes, tuple(max(one - usual, 1e-9) for one in fresh))


def copy_rates(device: torch.device, size_bytes: int) -> list[Rate]:
    """Copies over the link both ways, from pageable and pinned memory. Units are bytes. CUDA only."""
    there = torch.empty(size_bytes, dtype=torch.uint8, device=device)
    rates: list[Rate] = []
    for pinned, label in ((True, "pinned"), (False, "pageable")):
        here = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=pinned).fill_(1)
        for name, target, source in ((f"{label}_to_device", there, here), (f"{label}_to_host", here, there)):
            timed = time_repetitions(lambda _, t=target, s=source: t.copy_(s), device, 0.3)  # type: ignore[misc]
            rates.append(_rate(name, size_bytes, timed))  # type: ignore[arg-type]
    return rates


def launch_rates(device: torch.device) -> list[Rate]:
    """What the host adds to each operation: a real, very small model is run, and its operations alone.

    ``launch``: host seconds per operation of the model, modules, views and Python included (on a GPU: without waiting for
    it). ``python``: on a CPU the same less what the operations take when called one by one, with code and data out of the
    cache as they are between the operations of a larger model.
    """
    model = TinyModel(device)
    operations, alone = model.operations()
    if device.type == "cuda":
        return [_rate("launch", operations, _host_seconds(model.run, device))]
    timed = time_repetitions(lambda _: model.run(), device, 0.2)
    buffer = torch.ones(_EVICTED_BYTES // 4)
    with torch.no_grad():
        evictions = model.run_evicting(lambda: None)
    python = []
    for _ in range(_PYTHON_ROUNDS):  # in turn, so that a machine that slows down meanwhile slows both
        emptied = _median(time_repetitions(lambda _: model.run_evicting(lambda: buffer.add_(1)), device, 0.0))
        beside = _median(time_repetitions(lambda _: [buffer.add_(1) for _ in range(evictions)], device, 0.0))
        each = sum(_median(time_repetitions(run.run, device, 0.0)) for run in alone)
        python.append(max(emptied - beside - each, 1e-9))
    return [_rate("launch", operations, timed), _rate("python", operations, tuple(python))]


def _median(values: tuple[float, ...]) -> float:
    return statistics.median(values)


def _host_seconds(run: Any, device: torch.device) -> tuple[float, ...]:
    """Seconds until the host has enqueued one run, not until the device is done with it."""
    seconds, clock = [], time.perf_counter
    with torch.no_grad():
        for _ in range(8):
            torch.cuda.synchronize(device)
            start = clock()
            run()
            seconds.append(max(clock() - start, 1e-9))
        torch.cuda.synchronize(device)
    return tuple(seconds[1:])


__all__ = ["DEFAULT_SECONDS", "QUICK_SECONDS", "copy_rates", "fresh_memory_rate", "launch_rates", "picture_rate", "probe_device",
           "probe_host", "probe_operations"]  # fmt: skip
