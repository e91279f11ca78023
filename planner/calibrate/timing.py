"""Timing one callable: warm-up, repetitions within a time limit, and a clock that fits the device."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

LEAST, MOST = 3, 11
_ENQUEUE_SECONDS = 5e-5
"""Generous host time to enqueue one operation: the device sleeps that long so that the queue never runs dry."""
_MAX_CLOCK_HZ = 3e9


def time_repetitions(run: Callable[[int], Any], device: torch.device, budget_seconds: float, most: int = MOST) -> tuple[float, ...]:
    """Seconds of each repetition of ``run(repetition)`` after a warm-up; at least three, more while the budget lasts."""
    with torch.no_grad():
        run(0)
        return _on_cuda(run, device, budget_seconds, most) if device.type == "cuda" else _on_host(run, budget_seconds, most)


def host_clock() -> Callable[[], float]:
    """With one thread, time this thread was running: what other programs take of the machine is not the operation's.

    With more threads there is no such clock, for a waiting thread counts or not by the library's whim: wall time then.
    """
    return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter


def _on_host(run: Callable[[int], Any], budget_seconds: float, most: int) -> tuple[float, ...]:
    clock = host_clock()
    seconds: list[float] = []
    deadline = time.perf_counter() + budget_seconds
    while len(seconds) < LEAST or (len(seconds) < most and time.perf_counter() < deadline):
        start = clock()
        out = run(len(seconds) + 1)
        del out  # freeing is part of what an operation costs its caller
        seconds.append(max(clock() - start, 1e-9))
    return tuple(seconds)


def _on_cuda(run: Callable[[int], Any], device: torch.device, budget_seconds: float, most: int) -> tuple[float, ...]:
    """Device time by events. Short operations are enqueued many at a time behind a sleep, so the host's pace is not measured."""
    torch.cuda.synchronize(device)
    seconds: list[float] = []
    deadline = time.perf_counter() + budget_seconds
    first = _event_seconds(run, 1, device)
    inner = int(min(max(2e-4 / first, 1), 20))
    while len(seconds) < LEAST or (len(seconds) < most and time.perf_counter() < deadline):
        seconds.append(max(_event_seconds(run, inner, device) / inner, 1e-9))
    return tuple(seconds)


def _event_seconds(run: Callable[[int], Any], inner: int, device: torch.device) -> float:
    with torch.cuda.device(device):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(int(inner * _ENQUEUE_SECONDS * _MAX_CLOCK_HZ))
        start.record()
        for repetition in range(inner):
            run(repetition)
        end.record()
        end.synchronize()
        return max(float(start.elapsed_time(end)) * 1e-3, 1e-9)
