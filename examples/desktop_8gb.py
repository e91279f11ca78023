"""A desktop with a card of 8 GB: how many images at once, and what it costs. No weights and no such card are needed.

    python examples/desktop_8gb.py [MODEL] [GPU]
"""

from __future__ import annotations

import sys

from planner import NoFeasiblePlan, explain, max_batch_size
from planner.units import format_bytes, format_seconds

SCREEN = "1GiB"
"""What a desktop's windows and browser keep: the budget is the card's 8 GiB less this."""
MEMORY = "7GiB"


def main(model: str = "stable-diffusion-v1-5", gpu: str = "RTX 4060") -> int:
    most = max_batch_size(model, gpu, memory=MEMORY, limit=16)
    print(f"{model} on {gpu}, {MEMORY} left beside a screen that keeps {SCREEN}: up to {most} images at once")
    for batch in sorted({1, 4, most} - {0}):
        try:
            plan = explain(model, gpu, memory=MEMORY, batch_size=batch)
        except NoFeasiblePlan as error:
            print(f"  {batch:2} images: {error}")
            continue
        each, peak = format_seconds(plan.predicted.latency_seconds / batch), format_bytes(plan.predicted.peak_allocated_bytes)
        changes = " ".join(f"{name}={value}" for name, value in plan.changes.items()) or "as it is"
        print(f"  {batch:2} images: {each} each, peak {peak}, {changes}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:3]))
