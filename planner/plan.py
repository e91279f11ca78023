"""A plan: what was decided for one workload on one device, why, and how to put it in force."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any, Self

from pydantic import Field, PrivateAttr, ValidationError

from planner.errors import ApplyError, ProfileError
from planner.files import write_text
from planner.types import Alternative, Device, Estimate, Frozen, KnobValue, Measurement, Objective, Quality, Rejection, Workload

SCHEMA = "planner.plan/1"
MAX_FILE_BYTES = 16 << 20
LARGEST_INTEGER = 1 << 63
LARGEST_NUMBER = 1e30
"""Numbers above these, or nearer to zero than the inverse, are no sizes, rates or times: whatever is computed from them is finite."""


class FrontierPoint(Frozen):
    """A combination by what it needs. On the frontier no other needs less of both."""

    peak_allocated_bytes: int
    latency_seconds: float
    settings: dict[str, KnobValue]
    fits: bool


class WhatIf(Frozen):
    """What would change the decision: with ``extra_bytes`` more, ``settings`` would be chosen."""

    extra_bytes: int
    settings: dict[str, KnobValue]
    speedup: float


class SearchCounts(Frozen):
    """How large the space was and how much of it had to be looked at."""

    candidates: int
    evaluated: int


class Plan(Frozen):
    """Immutable. ``settings`` name every knob; ``apply`` and ``undo`` act on a pipeline and change no plan.

    ``measured`` is None until a checked run; :func:`planner.autoplan` returns plans that carry one.
    """

    schema_: str = Field(default=SCHEMA, alias="schema")
    model: str
    pipeline_class: str
    digest: str
    workload: Workload
    device: Device
    quality: Quality = "lossless"
    objective: Objective = "latency"
    calls: int | None = None
    settings: dict[str, KnobValue]
    baseline: dict[str, KnobValue]
    """The settings that leave the pipeline as it is."""
    predicted: Estimate
    baseline_predicted: Estimate | None = None
    measured: Measurement | None = None
    alternatives: tuple[Alternative, ...] = ()
    rejected: tuple[Rejection, ...] = ()
    frontier: tuple[FrontierPoint, ...] = ()
    candidates: tuple[FrontierPoint, ...] = ()
    """Combinations that were priced in full, fitting or not, by the settings in which they differ from the plan."""
    binding: str | None = None
    what_if: WhatIf | None = None
    counts: SearchCounts | None = None
    statements: tuple[str, ...] | None = None
    """Plain diffusers statements that do the same to a variable ``pipe``, in apply order; None: not written down."""
    batch_argument: str | None = None
    """Call argument of the pipeline that multiplies the batch."""
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    _bound: Any = PrivateAttr(default=None)

    @property
    def changes(self) -> dict[str, KnobValue]:
        """The settings that differ from leaving the pipeline as it is."""
        return {name: value for name, value in self.settings.items() if self.baseline.get(name) != value}

    # -- acting on a pipeline ---------------------------------------------------------------------------------------

    def apply(self, pipe: Any) -> Self:
        """Put the plan in force on ``pipe``, all of it or nothing; the plan itself, for ``with plan.apply(pipe): …``.

        Raises:
            ApplyError: a knob failed, or another plan is in force; the pipeline is as it was.
            UnsupportedPipeline: ``pipe`` is not of the class the plan was made for.
        """
        from planner.force import put_in_force

        put_in_force(self, pipe)
        return self

    def undo(self, pipe: Any = None) -> None:
        """Take the plan back; the pipeline is exactly as it was before. Without argument: the pipeline last applied to."""
        from planner.force import take_back

        target = pipe if pipe is not None else self._recall()
        if target is None:
            raise ApplyError("this plan is in force on no pipeline that still exists; pass the pipeline: plan.undo(pipe).")
        take_back(target)

    def run(self, pipe: Any, **inputs: Any) -> Any:
        """Call the pipeline under the plan: in as many calls as ``batch_split`` says, with progress and recovery from OOM.

        Returns what the pipeline returns; the images of a split batch are joined.
        """
        from planner.force import run_under

        return run_under(self, pipe, inputs)

    def changes_since(self, pipe: Any, **inputs: Any) -> list[str]:
        """What has changed since the plan was made (free memory, sizes in ``inputs``, components), one line each; empty: nothing."""
        from planner.watch import changes_since

        return changes_since(self, pipe, inputs)

    def replan(self, pipe: Any, **inputs: Any) -> Plan:
        """A new plan for the pipeline as it is now and for ``inputs``, with the same wishes; takes the place of what is in force.

        Raises: as :func:`planner.autoplan`; then no plan is in force and the pipeline is as it was.
        """
        from planner.force import replan

        return replan(self, pipe, inputs)

    def __enter__(self) -> Self:
        from planner.force import in_force

        target = self._recall()
        if target is None:
            raise ApplyError("no pipeline is known to this plan; write `with plan.apply(pipe):`.")
        if in_force(target) is None:
            self.apply(target)
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()

    def _remember(self, pipe: Any) -> None:
        self._bound = weakref.ref(pipe)

    def _recall(self) -> Any:
        return self._bound() if self._bound is not None else None

    # -- files ------------------------------------------------------------------------------------------------------

    def to_json(self, path: str | Path | None = None) -> str:
        """The plan as JSON text, sorted keys, same bytes for the same plan; also written to ``path`` when given."""
        text = json.dumps(self.model_dump(mode="json", by_alias=True), indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        if path is not None:
            write_text(Path(path), text)
        return text

    @classmethod
    def from_json(cls, source: str | Path) -> Plan:
        """The plan in a file, or in a JSON text. Plan files are data: nothing in them is executed.

        Raises:
            ProfileError: not a plan, another schema, too large; the message names the place inside it.
        """
        text, where = _read(source)
        try:
            content = json.loads(text, parse_int=_integer, parse_float=_number, parse_constant=_number)
            json.dumps(content, ensure_ascii=False).encode()  # half of a surrogate pair could be neither shown nor saved
        except (ValueError, RecursionError) as error:
            raise ProfileError(f"{where}: not JSON ({error}); a plan file comes from plan.to_json().") from error
        if not isinstance(content, dict) or content.get("schema") != SCHEMA:
            seen = content.get("schema") if isinstance(content, dict) else type(content).__name__
            raise ProfileError(f"{where}: schema is {seen!r}, this version reads {SCHEMA!r}.")
        try:
            plan = cls.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            raise ProfileError(f"{where}: {'.'.join(map(str, first['loc']))}: {first['msg']}.") from error
        from planner.knobs import parse_settings

        parse_settings(plan.settings)
        return plan

    # -- words ------------------------------------------------------------------------------------------------------

    def explain(self, verbose: bool = False) -> str:
        """The explanation as plain text: what `planner explain` prints."""
        from planner.explain.text import render

        return render(self, verbose=verbose)

    def to_python(self) -> str:
        """Plain diffusers code that does the same to a variable ``pipe`` without this package."""
        from planner.explain.code import render

        return render(self)

    def plot(self, path: str | Path | None = None) -> Any:
        """A matplotlib figure of memory over the call and of the frontier; saved to ``path`` when given."""
        from planner.explain.plot import draw

        return draw(self, path)

    def _repr_html_(self) -> str:
        from planner.explain.html import fragment

        return fragment(self)

    def __str__(self) -> str:
        return self.explain()


def _integer(text: str) -> int:
    value = int(text)
    if abs(value) >= LARGEST_INTEGER:
        raise ValueError(f"{text[:30]} is larger than any number of a plan")
    return value


def _number(text: str) -> float:
    value = float(text)
    if value and not 1 / LARGEST_NUMBER < abs(value) < LARGEST_NUMBER:
        raise ValueError(f"{text[:30]} is no number of a plan")
    return value


def _read(source: str | Path) -> tuple[str, str]:
    if isinstance(source, str) and source.lstrip().startswith(("{", "[")):
        if len(source) > MAX_FILE_BYTES:
            raise ProfileError(f"plan: {len(source)} characters are more than any plan has.")
        return source, "plan"
    path = Path(source)
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ProfileError(f"{path.name}: larger than any plan file ({MAX_FILE_BYTES} bytes).")
        return path.read_text(encoding="utf-8"), path.name
    except (OSError, ValueError) as error:
        raise ProfileError(f"{path}: cannot be read: {error}. Give a file that plan.to_json(path) wrote.") from error
