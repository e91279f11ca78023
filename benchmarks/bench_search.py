"""How long the search takes once the traces are there, on one core: ``python benchmarks/bench_search.py [MODEL] [GPU]``.

Prints processor time (what other processes do on the machine does not count), the size of the space on paper and what was
looked at. The first run for a model makes its traces, which takes minutes; they are cached.
"""

from __future__ import annotations

import os
import platform
import sys
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

from planner.cost.coefficients import default_coefficients
from planner.cost.model import CostModel
from planner.dryrun.provider import Traces
from planner.hardware.profiles import device_from_profile, find_gpu
from planner.knobs import Context
from planner.models import resolve
from planner.outcome import choose, explain_choice
from planner.space import build_space
from planner.types import Quality, Workload

BATCH = 8
GIB = 1 << 30


def main(name: str = "stable-diffusion-xl", gpu: str = "RTX 3060") -> None:
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}; {name} on {gpu}, batch {BATCH}")
    traces = Traces.of(resolve(name), Workload(batch_size=BATCH))
    device = device_from_profile(find_gpu(gpu)[0])
    for quality in ("exact", "lossless", "lossy"):
        for budget in (device.total_bytes, 6 * GIB, 2 * GIB):
            measure(traces, device.model_copy(update={"budget_bytes": budget}), quality)


def measure(traces: Traces, device: object, quality: Quality) -> None:
    """One line: a fresh model and space each time, the traces made before."""
    usable = dict.fromkeys(("inductor", "torchao", "xformers"))
    context = Context(facts=traces.facts, device=device, workload=traces.workload, quality=quality, usable=usable)
    build_space(context, CostModel(traces, device, default_coefficients(device), BATCH)).solver.best()  # the traces
    started = time.process_time()
    space = build_space(context, CostModel(traces, device, default_coefficients(device), BATCH))
    chosen = choose(space)
    searched = time.process_time()
    evaluated, visited = space.solver.evaluations, space.solver.visited
    explain_choice(space, chosen)
    explained = time.process_time()
    print(f"{quality:9} {device.budget_bytes / GIB:5.1f} GiB  {space.problem.size:>12,} candidates  {evaluated:5} phases priced, "
          f"{visited:4} sets of shared values  search {searched - started:.3f} s  reasons {explained - searched:.3f} s")  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
