"""A fault at any line that applying executes, or taking back, leaves the pipeline and the process exactly as they were."""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from random import Random
from types import CodeType, FrameType
from typing import Any, NamedTuple

import pytest
import torch

from planner import Plan
from planner.errors import ApplyError
from planner.force import in_force, put_in_force, take_back
from planner.knobs import KNOBS, violations
from planner.snapshot import Snapshot
from planner.snapshot import _swap as swap
from planner.types import KnobValue, Settings
from tests import sim
from tests.test_apply import SIM_SETTINGS, attributes, context, device, filled, prepared

ALL = os.environ.get("PLANNER_FAULT_LINES", "") == "all"
"""Every executed line, which takes hours; otherwise a sample of them."""
SAMPLE, SEED = 4, 7
"""Faults per set of settings in the sample, and where its draw starts."""
CHANGING = ("/planner/knobs/", "/planner/apply.py", "/planner/force.py", "/diffusers/", "/accelerate/", "/torchao/")
TRACED = ("/planner/", "/torch/", *CHANGING) if ALL else CHANGING
"""The sample leaves out what mostly reads, where most of the lines are executed: counting those takes longer than the faults."""
UNTRACED = "/torch/utils/__init__.py"
"""``swap_tensors``, with which the simulator does in steps what ``tensor.data = …`` does at once; its own test is below."""
MORE: dict[str, tuple[dict[str, KnobValue], ...]] = {
    # What the rules keep to CUDA applies elsewhere as well; the device is the CPU, as safetensors cannot load to another.
    "cpu": ({"tf32": True}, {"cudnn_benchmark": True}, {"offload": "group_leaf", "offload_disk": True},
            {"dtype": "bf16", "fuse_qkv": True, "channels_last": True, "compile": "regional"}),
    "sim": (*SIM_SETTINGS, {"offload": "group_leaf", "offload_stream": True}, {"offload": "model", "compile": "default"}),
}  # fmt: skip


MOVING = ("offload", "dtype", "quantization", "fuse_qkv", "channels_last")


class Fault(Exception):
    """Injected."""


class Place(NamedTuple):
    """The ``number``-th execution of a line."""

    code: CodeType
    line: int
    number: int

    def __str__(self) -> str:
        return f"{self.code.co_filename}:{self.line} ({self.code.co_name}), execution {self.number}"


def executed(action: Callable[[], Any], only: str | None = None) -> Counter[tuple[CodeType, int]]:
    """How often ``action`` executes each line of this package and of the libraries that it changes, or of one file."""
    seen: Counter[tuple[CodeType, int]] = Counter()

    def local(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            seen[frame.f_code, frame.f_lineno] += 1
        return local

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        file = frame.f_code.co_filename
        wanted = file.endswith(only) if only else any(part in file for part in TRACED) and not file.endswith(UNTRACED)
        return local if wanted else None

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    finally:
        sys.settrace(previous)
    return seen


def raising(action: Callable[[], Any], place: Place, error: BaseException | Callable[[], Any]) -> bool:
    """Do it with the error raised at that place, or the function called there. Whether the place was reached."""
    seen = [0]

    def local(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line" and frame.f_lineno == place.line:
            seen[0] += 1
            if seen[0] == place.number:
                sys.settrace(None)
                if isinstance(error, BaseException):
                    raise error
                error()
        return local

    previous = sys.gettrace()
    sys.settrace(lambda frame, *_: local if frame.f_code is place.code else None)
    try:
        action()
    finally:
        sys.settrace(previous)
    return seen[0] >= place.number


def outcome(action: Callable[[], Any]) -> BaseException | None:
    """What comes out."""
    try:
        action()
    except BaseException as error:
        return error
    return None


def places(action: Callable[[], Any], chance: Random, known: set[CodeType]) -> list[tuple[Place, type[BaseException]]]:
    """Where to raise what. All: every line at its last execution, when most has been changed, a knob's also at its first and with
    either error; lines of this package that are the same whatever the settings are (``known`` has them) once only. The sample has
    as many of this package as of the libraries.
    """
    lines, errors = executed(action), (Fault, KeyboardInterrupt)
    if ALL:
        fresh = [(Place(code, line, count), code.co_filename) for (code, line), count in lines.items() if code not in known]
        known |= {place.code for place, file in fresh if "/planner/" in file and "/planner/knobs/" not in file}
        return [(at, error) for number, (place, file) in enumerate(fresh) for is_knob in ["/planner/knobs/" in file]
                for at in ({place, place._replace(number=1)} if is_knob else {place})
                for error in (errors if is_knob else errors[number % 2 :][:1])]  # fmt: skip
    found = [Place(code, line, number) for (code, line), count in lines.items() for number in sorted({1, count})]
    groups = [[place for place in found if ("/planner/" in place.code.co_filename) is own] for own in (True, False)]
    drawn = [place for group in groups for place in chance.sample(group, min(SAMPLE // 2, len(group)))]
    return [(place, errors[number % 2]) for number, place in enumerate(drawn)]


class World:
    """A pipeline and all of the process that knobs or libraries change on the way, to be compared with later."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.before = Snapshot.of(pipe, checksums=True)
        self.rest = self.read()

    def read(self) -> dict[str, Any]:
        return {
            "attributes": attributes(self.pipe), "random state": torch.get_rng_state().tolist(), "gradients": torch.is_grad_enabled(),
            "levels": [logging.getLogger(name).level for name in ("diffusers", "accelerate", "torch")], "in force": in_force(self.pipe),
            "folders": sorted(Path(tempfile.gettempdir()).glob("planner-offload-*")), "default dtype": torch.get_default_dtype(),
        }  # fmt: skip

    def assert_holds(self, where: object) -> None:
        different = self.before.differences(self.pipe)
        assert not different, (where, different[:3])
        now = self.read()
        assert now == self.rest, (where, [name for name in now if now[name] != self.rest[name]])


def cases(family: str, kind: str) -> Iterator[dict[str, KnobValue]]:
    """Every value of every knob that the rules allow here, and some combinations; on the accelerator, of knobs that move weights."""
    facts = prepared(family)[2]
    where = context(facts, kind)
    for each in KNOBS:
        if kind == "cpu" or each.name in MOVING:
            for value in each.values(where)[1:]:
                if not violations({each.name: value}, where):
                    yield {each.name: value}
    for chosen in MORE[kind]:
        if len(chosen) > 1 or kind == "cpu" or chosen == {"offload": "none"}:
            yield filled(chosen, facts)


class Trial:
    """One pipeline on one device, and what happens to it under faults."""

    def __init__(self, family: str, kind: str) -> None:
        # A pipeline of its own: graphs that other tests left on a shared one would keep its tensors from being swapped.
        self.pipe, self.kind, self.chance = prepared.__wrapped__(family)[0], kind, Random(SEED)
        self.known: set[CodeType] = set()

    def prepare(self, settings: Settings) -> World:
        self.plan = Plan.model_construct(pipeline_class=type(self.pipe).__name__, settings=dict(settings), device=device(self.kind))
        for _ in range(2):  # libraries fill tables of their own at first
            self.put()
            take_back(self.pipe)
        gc.collect()
        gc.freeze()  # what is there by now is not looked at again by the collections after every failure
        return World(self.pipe)

    def put(self) -> None:
        put_in_force(self.plan, self.pipe)

    def while_applying(self, settings: Settings) -> int:
        """Faults before the plan is in force."""
        world = self.prepare(settings)
        chosen = places(self.put, self.chance, self.known)
        take_back(self.pipe)
        for place, kind in chosen:
            error = kind("injected")
            where = (settings, str(place), repr(error))
            caught = outcome(lambda at=place, one=error: raising(self.put, at, one))
            if caught is None:
                take_back(self.pipe)  # a library took the error for something else, and went on
            elif caught is not error:
                assert isinstance(caught, ApplyError), where
                assert caught.__cause__ is error, where
                assert "as it was before" in str(caught), where
            world.assert_holds(where)
        return len(chosen)

    def while_taking_back(self, settings: Settings) -> int:
        """Faults, and real Ctrl-C, on the way back."""
        world = self.prepare(settings)
        self.put()
        chosen = places(lambda: take_back(self.pipe), self.chance, self.known)
        chosen = chosen if ALL else self.chance.sample(chosen, min(SAMPLE // 2, len(chosen)))
        handler = signal.getsignal(signal.SIGINT)
        for number, (place, kind) in enumerate(chosen):
            error = kind("injected")
            where = (settings, str(place), repr(error))
            self.put()
            pressed = isinstance(error, KeyboardInterrupt) and number % 4 < 2
            injected = (lambda: signal.raise_signal(signal.SIGINT)) if pressed else error
            caught = outcome(lambda at=place, one=injected: raising(lambda: take_back(self.pipe), at, one))
            assert isinstance(caught, KeyboardInterrupt) if pressed else caught in (None, error), (where, repr(caught))
            if in_force(self.pipe) is not None:
                take_back(self.pipe)  # it had not begun
            assert signal.getsignal(signal.SIGINT) is handler
            world.assert_holds(where)
        return len(chosen)


@pytest.fixture
def on_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No other process's folders; the collector as before."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    yield
    gc.unfreeze()


@pytest.mark.slow
@pytest.mark.parametrize(("family", "kind"), [("sd15", "cpu"), ("flux", "sim"), *([("flux", "cpu"), ("sd15", "sim")] if ALL else [])])
@pytest.mark.parametrize("when", [Trial.while_applying, Trial.while_taking_back])
def test_a_fault_at_any_line_leaves_all_as_it_was(
    family: str, kind: str, when: Callable[[Trial, Settings], int], on_its_own: None, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    trial, counts = Trial(family, kind), Counter[str]()
    with sim.active() if kind == "sim" else nullcontext():
        for settings in cases(family, kind):
            counts["settings"] += 1
            counts["faults"] += when(trial, settings)
            if ALL:
                with capsys.disabled():
                    print(settings, dict(counts), flush=True)
    with capsys.disabled():
        print(f"\n{when.__name__} on {family}, {kind}: {dict(counts)}, seed {SEED}")
    assert counts["faults"] >= counts["settings"]


def test_a_fault_while_tensors_are_swapped_leaves_both_as_they_were() -> None:
    """Quantized weights move so; the target is ``meta`` here."""
    def pair() -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
        weight, moved = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.empty(2, device="meta"))
        weight.note = "kept"
        return weight, moved

    weight, moved = pair()
    steps = executed(lambda: torch.utils.swap_tensors(weight, moved), only=UNTRACED)
    lines = [Place(code, line, number) for (code, line), count in steps.items() for number in range(1, count + 1)]
    assert weight.device.type == "meta"
    assert len(lines) > 10
    for place in lines:
        weight, moved = pair()
        error = Fault("injected")
        assert outcome(lambda at=place, one=error, pair=(weight, moved): raising(lambda: swap(*pair), at, one)) is error
        assert (weight.device.type, weight.tolist(), vars(weight), vars(moved)) == ("cpu", [1, 1], {"note": "kept"}, {}), str(place)
        swap(weight, moved)
        assert (weight.device.type, moved.tolist(), vars(moved)) == ("meta", [1, 1], {"note": "kept"})
