"""The process that owns the device: builds one subject, measures the cells it is sent, and ends with its parent.

Requests come as JSON lines on stdin, answers go as JSON lines to what stdout was; everything that libraries print goes to
stderr. At the end of stdin the process ends at once, whatever it was doing.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
from typing import IO, Any


def main(argv: list[str] | None = None) -> int:
    """``python -m benchmarks.gpu.worker SUBJECT DEVICE RUN``."""
    subject, device_name, run = argv if argv is not None else sys.argv[1:4]
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    requests: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_listen, args=(sys.stdin, requests), daemon=True).start()
    started = time.perf_counter()
    try:
        work = _Work(subject, device_name, run)
    except Exception as error:
        _tell(answers, {"event": "failed", "text": f"{type(error).__name__}: {error}"[:600]})
        return 1
    _tell(answers, {"event": "ready", "seconds": time.perf_counter() - started})
    while True:
        line = requests.get()
        record, clean = work.measure(line)
        _tell(answers, {"event": "record", "clean": clean, "record": json.loads(record.line())})
        if not clean:
            return 0


def _listen(stream: IO[str], requests: queue.Queue[str]) -> None:
    for line in stream:
        if line.strip():
            requests.put(line)
    os._exit(0)


def _tell(answers: IO[str], message: dict[str, Any]) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


class _Work:
    """One subject on one device, ready to be measured."""

    def __init__(self, subject: str, device_name: str, run: str) -> None:
        import torch

        from benchmarks.gpu.machine import NvmlReader, describe
        from benchmarks.gpu.sides import CpuSide, CudaSide, Side
        from planner.hardware.detect import detect_device

        self.run = run
        self.torch_device = torch.device("cuda", 0) if device_name.startswith("cuda") else torch.device("cpu")
        context, self.reader = None, None
        if self.torch_device.type == "cuda":
            torch.zeros(1, device=self.torch_device)
            free, total = torch.cuda.mem_get_info(self.torch_device)
            context = int(total) - int(free) - torch.cuda.memory_reserved(self.torch_device)
        self.device = detect_device(str(self.torch_device), torch=torch)
        self.machine = describe(self.device, torch.get_num_threads(), context)
        self.pipe = self._built(subject)
        self.side: Side = CpuSide(self.pipe)
        if self.torch_device.type == "cuda":
            self.reader = NvmlReader(self.machine.uuid)
            self.side = CudaSide(self.torch_device, nvml_used=self.reader.used_bytes)
        self.bench: Any = self._bench() if self.pipe is not None else None

    def _built(self, subject: str) -> Any:
        if subject == "device":
            return None
        from benchmarks.gpu.build import build

        return build(subject)

    def _bench(self) -> Any:
        from benchmarks.gpu.measure import Bench
        from planner.dryrun.facts import read_facts

        return Bench(self.pipe, read_facts(self.pipe), self.side, self.reader)

    def measure(self, line: str) -> tuple[Any, bool]:
        """The record of one request, and whether the process can go on."""
        from benchmarks.gpu.practices import LEAVES_TRACES
        from benchmarks.gpu.probing import run_probes
        from benchmarks.gpu.records import Cell, Failure, Record
        from planner.calibrate.samples import Run
        from planner.calibrate.store import now

        cell = Cell.model_validate_json(line)
        begun, date = time.perf_counter(), now()
        probes = cell.kind == "probe"
        outcome: Any = run_probes(cell, self.device, self.torch_device) if probes else self.bench.run(cell)
        clean = cell.practice not in LEAVES_TRACES and not (self.bench is not None and self.bench.broken)
        part = "failure" if isinstance(outcome, Failure) else "probes" if isinstance(outcome, Run) else "seen"
        kept = cell.model_copy(update={"operations": {}})
        values: dict[str, Any] = {part: outcome}
        return Record(run=self.run, key=cell.key, cell=kept, started=date, seconds=time.perf_counter() - begun, machine=self.machine,
                      **values), clean  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
