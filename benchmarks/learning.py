"""Learning on this CPU: predictions of one pipeline before and after a handful of checked runs.

Each round plans, applies and checks the same pipeline with a store of its own; what the run showed corrects the next prediction.
Run on a quiet machine: python -m benchmarks.learning [rounds]
"""

from __future__ import annotations

import os
import sys
import tempfile

from planner.units import format_bytes, format_seconds

FIXED = {"dtype": "fp32", "compile": "none", "channels_last": False, "vae_slicing": False, "batch_split": 1}
"""One plan throughout, so that what changes is the prediction."""


def main() -> int:
    """Print predicted, measured and error of memory and time per round."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 6
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PLANNER_CACHE_DIR"] = folder
        from examples.closed_loop import small_pipeline
        from planner import autoplan

        pipe = small_pipeline()
        inputs = {"prompt": "a small boat on a wide river", "height": 256, "width": 256, "num_inference_steps": 4, "output_type": "np"}
        print(f"{'round':>5}{'memory predicted':>18}{'measured':>10}{'error':>8}{'time predicted':>16}{'measured':>10}{'error':>8}")
        for number in range(1, rounds + 1):
            plan = autoplan(pipe, batch_size=2, inputs=inputs, device="cpu", fix=FIXED)
            seen, guess = plan.measured, plan.predicted
            plan.undo(pipe)
            if seen is None or seen.peak_allocated_bytes is None:
                return 1
            memory = guess.peak_allocated_bytes / seen.peak_allocated_bytes - 1
            time = guess.latency_seconds / seen.latency_seconds - 1
            print(f"{number:>5}{format_bytes(guess.peak_allocated_bytes):>18}{format_bytes(seen.peak_allocated_bytes):>10}{memory:>+8.1%}"
                  f"{format_seconds(guess.latency_seconds):>16}{format_seconds(seen.latency_seconds):>10}{time:>+8.1%}")  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
