"""The raw results on disk: JSON lines, each forced to the disk before the next cell starts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from benchmarks.gpu.records import Record
from planner.errors import CalibrationError

MAX_FILE_BYTES = 15 << 20
"""Below 16 MiB, so that every file can be carried by what limits files to that."""
MAX_FILES = 6
MAX_LINE_BYTES = 8 << 20


class Ledger:
    """Appends records to ``cells-0001.jsonl`` and so on in one folder. A line that a kill cut short is ignored when read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def files(self) -> list[Path]:
        """The files so far, oldest first."""
        return sorted(self.folder.glob("cells-[0-9][0-9][0-9][0-9].jsonl"))

    def append(self, record: Record) -> None:
        """Write one record and wait until the disk has it.

        Raises:
            CalibrationError: the folder holds as much as it may.
            OSError: the disk is full or gone.
        """
        line = record.line().encode() + b"\n"
        path = self._file_for(len(line))
        with path.open("ab") as file:
            if file.tell() and not _ends_line(path):
                line = b"\n" + line  # what a killed run left half written becomes a line of its own
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def _file_for(self, size: int) -> Path:
        files = self.files()
        if files and files[-1].stat().st_size + size <= MAX_FILE_BYTES:
            return files[-1]
        if len(files) >= MAX_FILES:
            raise CalibrationError(f"{self.folder}: {MAX_FILES} files of results are full; give another folder with --out.")
        return self.folder / f"cells-{len(files) + 1:04d}.jsonl"

    def records(self) -> list[Record]:
        """Every readable record, in order."""
        return [record for path in self.files() for record in read_records(path)]


def _ends_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def read_records(path: Path) -> Iterator[Record]:
    """The records of one file; a broken last line (a kill in the middle of writing) or a broken line before a good one is skipped."""
    with path.open("rb") as file:
        for raw in file:
            if raw.strip() and len(raw) <= MAX_LINE_BYTES:
                try:
                    yield Record.parse(raw.decode("utf-8"))
                except ValueError:
                    continue


def latest(records: list[Record]) -> list[Record]:
    """One record per cell: the last that says something of it, else the last."""
    found: dict[str, Record] = {}
    for record in records:
        identity = record.cell.identity
        if identity not in found or record.done or not found[identity].done:
            found[identity] = record
    return list(found.values())


__all__ = ["Ledger", "latest", "read_records"]
