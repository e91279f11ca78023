"""How long the command line takes to start and to explain: ``python benchmarks/bench_cli.py [MODEL] [GPU] [REPETITIONS]``.

Each line is a fresh process: wall-clock and processor seconds (the median of the repetitions) beside the limit this project sets
itself. "cold" starts with an empty cache of traces, "cached" with the one the cold run left. Processor time is what to compare on
a busy machine: other processes stretch the clock, not the work.
"""

from __future__ import annotations

import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time

from planner.hardware.profiles import load_gpus

LIMITS = {"--help": 0.5, "cold": 8.0, "cached": 1.0, "compare": 4.0}
"""Seconds on two cores; a table of one model on 40 cards, cached, so that one of ten models takes ten times as long."""
CARDS = 40


def main(model: str = "stable-diffusion-xl", gpu: str = "RTX 3060", repetitions: str = "3") -> None:
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, load {os.getloadavg()[0]:.1f}")
    explain = ("explain", model, "--gpu", gpu, "--batch-size", "8")
    report("--help", "planner --help", [timed(("--help",), None) for _ in range(int(repetitions))])
    cold, cached, table = [], [], []
    for _ in range(int(repetitions)):
        with tempfile.TemporaryDirectory(prefix="planner-bench-") as cache:
            cold.append(timed(explain, cache))
            cached.append(timed(explain, cache))
            compare = ("compare", model, *(f"--gpu={gpu.name}" for gpu in load_gpus()[:: len(load_gpus()) // CARDS][:CARDS]))
            timed(compare, cache)
            table.append(timed(compare, cache))
    report("cold", " ".join(explain[:2]), cold)
    report("cached", " ".join(explain[:2]), cached)
    report("compare", f"compare {model}, {CARDS} cards", table)


def timed(words: tuple[str, ...], cache: str | None) -> tuple[float, float]:
    """Wall-clock and processor seconds of one command in a process of its own, children included."""
    environment = os.environ | {"OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"} | ({"PLANNER_CACHE_DIR": cache} if cache else {})
    before, start = used_seconds(), time.perf_counter()
    subprocess.run([sys.executable, "-m", "planner", *words], env=environment, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start, used_seconds() - before


def used_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def report(name: str, what: str, times: list[tuple[float, float]]) -> None:
    wall, used = (statistics.median(column) for column in zip(*times, strict=True))
    limit = LIMITS[name]
    print(f"{name:8} {what:36} {wall:6.2f} s wall, {used:6.2f} s processor; {used / limit:5.2f} of the {limit:g} s allowed")


if __name__ == "__main__":
    main(*sys.argv[1:])
