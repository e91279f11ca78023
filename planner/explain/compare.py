"""Models x GPUs x batch sizes: what runs where, how fast, with which plan."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from planner.errors import NoFeasiblePlan, PlannerError, UsageError
from planner.explain import words
from planner.explain.layout import DEFAULT_WIDTH, LEAST_WIDTH, paragraph, table
from planner.progress import Progress, silent
from planner.types import Frozen, KnobValue
from planner.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from planner.autoplan import Glances

SCHEMA = "planner.comparison/1"
Spread = Callable[[Callable[[str], list["Cell"]], Iterable[str]], Iterable[list["Cell"]]]


class Cell(Frozen):
    """One model on one GPU with one batch size. ``reason`` says why there is no plan, and is None where there is one."""

    model: str
    gpu: str
    batch_size: int
    budget_bytes: int | None = None
    settings: dict[str, KnobValue] | None = None
    """What the plan changes; None without a plan."""
    peak_allocated_bytes: int | None = None
    latency_seconds: float | None = None
    samples_per_second: float | None = None
    shortfall_bytes: int | None = None
    reason: str | None = None


def compare(models: Sequence[str] | None = None, gpus: Sequence[str] | None = None, batch_sizes: Sequence[int] = (1,),
            *, say: Progress = silent, spread: Spread | None = None, **request: Any) -> tuple[Cell, ...]:  # fmt: skip
    """Plan every combination; ``models`` default to all bundled ones and ``gpus`` to all known ones.

    ``request``: further options of :func:`planner.explain`, the same for all. ``spread``: ``map``, or one that spreads the
    models over processes.

    Raises:
        HardwareError, ProfileError: a GPU or model that is not known at all.
        UsageError: an option that no combination could have.
    """
    from planner.hardware.profiles import find_gpu, load_gpus
    from planner.models import list_profiles, resolve

    chosen_models = list(models) if models else [profile.name for profile in list_profiles()]
    chosen_gpus = list(gpus) if gpus else [gpu.name for gpu in load_gpus()]
    for model in chosen_models:
        resolve(model)
    for gpu in chosen_gpus:
        if gpu.strip().lower() != "cpu":
            find_gpu(gpu)
    say(f"planning {len(chosen_models)} models on {len(chosen_gpus)} devices")
    rows = partial(_rows, gpus=chosen_gpus, batch_sizes=batch_sizes, request=request)
    cells: list[Cell] = []
    for model, found in zip(chosen_models, (spread or map)(rows, chosen_models), strict=True):
        cells += found
        say(f"planned {model}: {len(cells)} of {len(chosen_models) * len(found)} plans")
    return tuple(cells)


def _rows(model: str, gpus: Sequence[str], batch_sizes: Sequence[int], request: Mapping[str, Any]) -> list[Cell]:
    """One model on every GPU; what follows from its traces alone is found out once."""
    from planner.autoplan import Glances

    glances = {batch: Glances(model, batch_size=batch, **request) for batch in batch_sizes}
    return [_cell(model, gpu, batch, glances[batch]) for gpu in gpus for batch in batch_sizes]


def _cell(model: str, gpu: str, batch: int, glances: Glances) -> Cell:
    try:
        seen = glances.on(gpu)
    except NoFeasiblePlan as error:
        short = f"short by {format_bytes(error.shortfall_bytes)}" if error.shortfall_bytes is not None else str(error)
        return Cell(model=model, gpu=gpu, batch_size=batch, shortfall_bytes=error.shortfall_bytes, reason=f"nothing fits, {short}")
    except UsageError:
        raise
    except PlannerError as error:
        return Cell(model=model, gpu=gpu, batch_size=batch, reason=str(error))
    seconds = seen.predicted.latency_seconds
    return Cell(
        model=glances.model, gpu=seen.device.name, batch_size=seen.batch_size, budget_bytes=seen.device.budget_bytes,
        settings=seen.changes, peak_allocated_bytes=seen.predicted.peak_allocated_bytes, latency_seconds=seconds,
        samples_per_second=seen.batch_size / seconds if seconds else None,
    )  # fmt: skip


def _plan_words(cell: Cell) -> str:
    if cell.settings is None:
        return cell.reason or "no plan"
    return words.settings_text(cell.settings, "as it is")


def _short(gpu: str) -> str:
    """A card's name without its maker's; `--gpu` takes it as well."""
    return gpu.removeprefix("NVIDIA ").removeprefix("GeForce ")


_HEAD = ("GPU", "batch", "peak", "a call", "per second")
PLAN_ROOM = 32
NARROW = 76
"""Below this width the settings of a plan stand on a line of their own."""


def _row(cell: Cell) -> tuple[str, ...]:
    rate = "" if cell.samples_per_second is None else f"{cell.samples_per_second:.3g}"
    sizes = ("", "") if cell.settings is None else (format_bytes(cell.peak_allocated_bytes), format_seconds(cell.latency_seconds))
    return (_short(cell.gpu), str(cell.batch_size), *sizes, rate)


def render_text(cells: Sequence[Cell], width: int | None = None) -> str:
    """One aligned table per model, all in the same columns; plans are wrapped, never cut."""
    room = max(width or DEFAULT_WIDTH, LEAST_WIDTH)
    head, *labels = table([_HEAD, *map(_row, cells)], room - (PLAN_ROOM if room >= NARROW else 0), indent=2)
    indent = max(map(len, [head, *labels])) + 2 if room >= NARROW else 6
    lines: list[str] = []
    for place, (cell, label) in enumerate(zip(cells, labels, strict=True)):
        if place == 0 or cells[place - 1].model != cell.model:
            lines += [*([""] if lines else []), cell.model, *paragraph(head, "plan", room, indent)]
        lines += paragraph(label, _plan_words(cell), room, indent)
    return "\n".join(lines or [head]) + "\n"


def render_csv(cells: Sequence[Cell]) -> str:
    """One line per combination; bytes and seconds, empty where there is no plan."""
    target = io.StringIO()
    names = [name for name in Cell.model_fields if name != "settings"]
    writer = csv.writer(target, lineterminator="\n")
    writer.writerow([*names, "plan"])
    for cell in cells:
        values = ["" if (value := getattr(cell, name)) is None else value for name in names]
        writer.writerow([*values, "" if cell.settings is None else words.settings_text(cell.settings, "as it is")])
    return target.getvalue()


def to_data(cells: Sequence[Cell]) -> dict[str, Any]:
    """What ``planner compare --json`` prints."""
    return {"schema": SCHEMA, "rows": [cell.model_dump(mode="json") for cell in cells]}


def render_html(cells: Sequence[Cell]) -> str:
    """One self-contained page with the table, searchable."""
    from planner.explain.page import SEARCH, document
    from planner.explain.page import table as html_table

    head = ("model", *_HEAD, "plan")
    rows: list[tuple[object, ...]] = [(cell.model, *_row(cell), _plan_words(cell)) for cell in cells]
    lost = frozenset(place for place, cell in enumerate(cells) if cell.settings is None)
    found = html_table(head, rows, frozenset(range(2, 6)), frozenset({0}), lost)
    return document("What runs where", f"<h1>What runs where</h1><section>{SEARCH}{found}</section>")
