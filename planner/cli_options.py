"""The options that commands share, each defined once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(help="Bundled name, hub id (owner/name) or folder in diffusers layout.", show_default=False)]
Gpu = Annotated[str | None, typer.Option("--gpu", help="Card by name, or cpu; default: what is detected.")]
Gpus = Annotated[list[str] | None, typer.Option("--gpu", help="Card by name, or cpu; may be repeated.")]
Memory = Annotated[str | None, typer.Option("--memory", help='Device memory budget, such as "8GiB".')]
HostMemory = Annotated[str | None, typer.Option("--host-memory", help='Host RAM budget, such as "16GiB".')]
BatchSize = Annotated[int, typer.Option("--batch-size", help="Images (or clips) per call.")]
Height = Annotated[int | None, typer.Option("--height", help="Pixels; default: the pipeline's.")]
Width = Annotated[int | None, typer.Option("--width", help="Pixels; default: the pipeline's.")]
Frames = Annotated[int | None, typer.Option("--frames", help="Frames of a clip.")]
Steps = Annotated[int | None, typer.Option("--steps", help="Denoising steps.")]
Guidance = Annotated[float | None, typer.Option("--guidance", help="Guidance scale.")]
Quality = Annotated[str, typer.Option("--quality", help="exact, lossless or lossy.")]
Objective = Annotated[str, typer.Option("--objective", help="latency, throughput or memory.")]
Calls = Annotated[int | None, typer.Option("--calls", help="Calls you will make; one-off costs are weighed against them.")]
Fix = Annotated[list[str] | None, typer.Option("--fix", metavar="KNOB=VALUE", help="A knob you decided; may be repeated.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KNOB=VALUE", help="A knob's value; may be repeated.")]
Json = Annotated[bool, typer.Option("--json", help="The same as JSON.")]
Html = Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Also write one self-contained page.")]
Python = Annotated[bool, typer.Option("--python", help="Plain diffusers code that does the same.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Every term, phase, alternative and rejection.")]
PlanFile = Annotated[Path, typer.Argument(metavar="PLAN.json", help="A file that plan.to_json(path) or --json wrote.")]
