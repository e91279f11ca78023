"""Small real diffusers pipelines with random weights, one per family: seeded, on the CPU, in float32, built in code.

`FAMILIES[name].build()` gives a fresh pipeline, `.inputs(pipe)` the keyword arguments of one realistic call of it and
`.run(pipe)` the call's main output as an array. No file and no network is read. `.kind` names the file it comes from:
image_unet, image_dit, video, audio or other.
"""

from . import audio, image_dit, image_staged, image_unet, more, other, video
from .case import FAMILIES, PROMPT, Case, as_array, prepared, seeded

__all__ = [
    "FAMILIES", "PROMPT", "Case", "as_array", "prepared", "seeded",
    "audio", "image_dit", "image_staged", "image_unet", "more", "other", "video",
]  # fmt: skip
