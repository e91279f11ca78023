"""Seconds, resident memory and independence of steps of dry runs at real sizes: ``python benchmarks/bench_dryrun.py``.

Nothing is loaded; imports and building the model are not counted. Each model runs in a fresh process.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time

from planner.types import Workload

CASES = {
    "SDXL 1024x1024, batch 8, 30 steps": ("stable-diffusion-xl", Workload(batch_size=8, num_inference_steps=30), 2.0),
    "SDXL, the same with 1000 steps": ("stable-diffusion-xl", Workload(batch_size=8, num_inference_steps=1000), None),
    "FLUX.1-dev 1024x1024, 28 steps": ("flux.1-dev", Workload(num_inference_steps=28), 2.0),
    "Wan 2.1 14B, 81 frames of 480x832, 50 steps": (
        "wan2.1-t2v-14b", Workload(num_frames=81, height=480, width=832, num_inference_steps=50), 4.0),
}  # fmt: skip
"""Name to (bundled model, workload, seconds aimed at)."""


def measure(model: str, workload: Workload) -> dict[str, float]:
    """One dry run in this process; memory is the growth of the largest resident size, in MB."""
    import diffusers  # noqa: F401  imports are not what is measured
    import transformers  # noqa: F401

    from planner.dryrun.run import DryRun
    from planner.models import resolve

    pipe = resolve(model).build()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    trace = DryRun(pipe, workload).trace()
    seconds = time.perf_counter() - start
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"seconds": seconds, "grown_mb": grown, "calls": len(trace.calls), "events": len(trace.events),
            "operations": sum(len(call) for call in trace.calls)}  # fmt: skip


def main() -> None:
    """Run every case in its own process and print one line each."""
    if len(sys.argv) > 1:
        model, workload, _ = CASES[sys.argv[1]]
        print(json.dumps(measure(model, workload)))
        return
    for name, (_, _, aim) in CASES.items():
        done = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{name:46}  not run: {done.stderr.strip().splitlines()[-1][:120]}")
            continue
        found = json.loads(done.stdout.splitlines()[-1])
        ratio = f"{found['seconds'] / aim:5.2f} of {aim:g} s" if aim else " " * 13
        print(f"{name:46}  {found['seconds']:6.2f} s  {ratio}  +{found['grown_mb']:4.0f} MB  {found['operations']} operations in "
              f"{found['calls']} distinct calls, {found['events']} calls in all")  # fmt: skip


if __name__ == "__main__":
    main()
