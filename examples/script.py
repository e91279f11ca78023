"""A script that takes whatever pipeline and card there are: python examples/script.py MODEL_FOLDER_OR_ID "a prompt" [BATCH]

The plan is checked once, printed, and kept beside the pictures, so that the next run can be compared: planner diff old.json plan.json
"""

from __future__ import annotations

import sys

import torch
from diffusers import DiffusionPipeline

from planner import NoFeasiblePlan, autoplan


def main(model: str, prompt: str, batch: int = 4) -> int:
    pipe = DiffusionPipeline.from_pretrained(model, dtype=torch.float16 if torch.cuda.is_available() else torch.float32)
    try:
        plan = autoplan(pipe, batch_size=batch, inputs={"prompt": prompt})
    except NoFeasiblePlan as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(plan.explain(), end="")
    plan.to_json("plan.json")
    for number, image in enumerate(plan.run(pipe, prompt=prompt).images):
        image.save(f"image-{number}.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:4])))
