"""A plan as a matplotlib figure. matplotlib is optional: `pip install 'diffusers-planner[plot]'`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.errors import UsageError
from planner.explain import charts, words
from planner.units import GIB

if TYPE_CHECKING:
    from planner.plan import Plan


def draw(plan: Plan, path: str | Path | None = None) -> Any:
    """A figure of memory along the call and of memory against latency; written to ``path`` when given.

    Raises:
        UsageError: matplotlib is not installed, or ``path`` cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("A plot needs matplotlib, which is not installed; run: pip install 'diffusers-planner[plot]'.") from error
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    _timeline(left, plan)
    _scatter(right, plan)
    figure.suptitle(f"{plan.model} on {plan.device.name}: {words.plan_line(plan)}", fontsize=9)
    if path is not None:
        _save(figure, path)
    return figure


def _timeline(axis: Any, plan: Plan) -> None:
    start, phases = 0.0, plan.predicted.phases
    for phase in phases:
        below = 0.0
        for name, size in charts.layers(phase).items():
            axis.bar(start, size / GIB, width=phase.seconds, bottom=below, align="edge", color=f"C{charts.LAYERS.index(name)}")
            below += size / GIB
        start += phase.seconds
    for place, name in enumerate(charts.LAYERS):
        axis.bar(0, 0, color=f"C{place}", label=name)
    _budget(axis, plan)
    axis.set(xlabel="seconds of one call", ylabel="GiB", title="memory along the call")
    axis.legend(fontsize=7)


def _scatter(axis: Any, plan: Plan) -> None:
    edge = charts.staircase(plan)
    axis.plot([x for x, _ in edge], [y / GIB for _, y in edge], linewidth=1.5, color="C0", label="frontier")
    for fits, colour, label in ((True, "0.5", "fits"), (False, "red", "does not fit")):
        found = [point for point in plan.candidates if point.fits is fits]
        sizes = [point.peak_allocated_bytes / GIB for point in found]
        axis.scatter([point.latency_seconds for point in found], sizes, s=10, color=colour, label=label)
    chosen = plan.predicted
    axis.scatter([chosen.latency_seconds], [chosen.peak_allocated_bytes / GIB], s=60, marker="*", color="green", zorder=3, label="chosen")
    _budget(axis, plan)
    axis.set(xlabel="seconds of one call", ylabel="GiB", title="memory against latency")
    axis.legend(fontsize=7)


def _budget(axis: Any, plan: Plan) -> None:
    if plan.device.budget_bytes is not None:
        axis.axhline(plan.device.budget_bytes / GIB, linestyle="--", color="red", linewidth=1)


def _save(figure: Any, path: str | Path) -> None:
    try:
        figure.savefig(str(path), dpi=120, metadata={"Software": None} if str(path).endswith(".png") else None)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: the plot cannot be written ({error}); give a .png, .svg or .pdf path.") from error
