"""Worker processes, one at a time, one per subject: what one cell breaks, the next one does not inherit."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.records import Cell, Failure, FailureKind, Record, Stage
from planner.calibrate.store import now

ROOT = Path(__file__).resolve().parents[2]
END_SECONDS = 5.0


@dataclass(slots=True)
class Pool:
    """Starts a worker for a subject when it is needed and stops it when another is, or when a cell left it unclean."""

    device: str
    run_id: str
    switch_seconds: dict[str, float]
    log: Path
    """File that gets what workers print."""
    cache: Path
    """Folder of torch.compile's cache: compiled once in a campaign, anew in the next."""
    command: tuple[str, ...] = (sys.executable, "-m", "benchmarks.gpu.worker")
    current: str | None = None
    _process: subprocess.Popen[str] | None = None
    _answers: queue.Queue[str | None] = field(default_factory=queue.Queue)

    def run(self, cell: Cell, limit_seconds: float) -> Record:
        """The cell's record. A worker that does not answer in time is killed; that, too, is a record."""
        begun, date = time.monotonic(), now()
        deadline = begun + limit_seconds
        problem = self._ready(cell.subject, deadline)
        if problem is not None:
            return self._failed(cell, date, begun, *problem)
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(cell.model_dump_json() + "\n")
            self._process.stdin.flush()
        except OSError:
            return self._failed(cell, date, begun, "crashed", "first", self._exit_text())
        answer = self._answer(deadline)
        if answer is None:
            return self._failed(cell, date, begun, *self._no_answer(deadline, limit_seconds))
        if not answer["clean"]:
            self.close()
        return Record.model_validate(answer["record"])

    def _ready(self, subject: str, deadline: float) -> tuple[FailureKind, Stage, str] | None:
        """A worker for the subject is there; else why not."""
        if self.current == subject and self._process is not None and self._process.poll() is None:
            return None
        self.close()
        begun = time.monotonic()
        self._start(subject)
        answer = self._answer(deadline)
        if answer is None:
            kind, _, text = self._no_answer(deadline, deadline - begun)
            return kind, "build", text
        if answer["event"] != "ready":
            self.close()
            return "error", "build", str(answer.get("text"))
        self.current = subject
        self.switch_seconds[subject] = time.monotonic() - begun
        return None

    def _start(self, subject: str) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
                       "TORCHINDUCTOR_CACHE_DIR": str(self.cache / "inductor"), "TRITON_CACHE_DIR": str(self.cache / "triton"),
                       "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}  # fmt: skip
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*self.command, subject, self.device, self.run_id], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                text=True, encoding="utf-8", env=environment, cwd=ROOT)  # fmt: skip
        self._answers = queue.Queue()
        threading.Thread(target=_listen, args=(self._process.stdout, self._answers), daemon=True).start()

    def _answer(self, deadline: float) -> dict[str, Any] | None:
        """The next answer; None when the worker ended or the time was up."""
        try:
            line = self._answers.get(timeout=max(deadline - time.monotonic(), 0.01))
        except queue.Empty:
            return None
        parsed: dict[str, Any] | None = json.loads(line) if line is not None else None
        return parsed

    def _no_answer(self, deadline: float, limit_seconds: float) -> tuple[FailureKind, Stage, str]:
        if time.monotonic() >= deadline:
            self._kill()
            return "overran", "repeat", f"stopped after {limit_seconds:.0f} s"
        return "crashed", "first", self._exit_text()

    def _exit_text(self) -> str:
        code = None
        if self._process is not None:
            try:
                code = self._process.wait(timeout=END_SECONDS)
            except subprocess.TimeoutExpired:
                self._kill()
        self.current = None
        return f"the process ended with exit code {code}; see {self.log.name}"

    def _failed(self, cell: Cell, date: str, begun: float, kind: FailureKind, stage: Stage, text: str) -> Record:
        kept = cell.model_copy(update={"operations": {}})
        failure = Failure(kind=kind, stage=stage, text=text[:2000])
        return Record(run=self.run_id, key=cell.key, cell=kept, started=date, seconds=time.monotonic() - begun, failure=failure)

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process, self.current = None, None

    def close(self) -> None:
        """End the worker: at the end of its input it goes by itself."""
        if self._process is not None:
            if self._process.stdin is not None:
                with suppress(OSError):
                    self._process.stdin.close()
            try:
                self._process.wait(timeout=END_SECONDS)
            except subprocess.TimeoutExpired:
                self._kill()
        self._process, self.current = None, None


def _listen(stream: Any, answers: queue.Queue[str | None]) -> None:
    for line in stream:
        answers.put(line)
    answers.put(None)


__all__ = ["Pool", "ROOT"]
