"""Files that are written whole or not at all, and folders that do not outlive their process by long."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A new file that takes the place of ``path`` when the block ends well, and vanishes when it does not.

    Raises OSError where the disk is full or not writable; ``path`` is then as it was.
    """
    fresh = path.with_name(f".{path.stem}.{secrets.token_hex(6)}.tmp")
    try:
        with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(fresh)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file as UTF-8, whole or not at all; a terminal, a pipe or another device is simply written to.

    Raises OSError where it cannot be written.
    """
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
        return
    with replacing(path.resolve()) as file:
        file.write(text.encode("utf-8"))


class ScratchFolder:
    """A folder of this process for large files. What a killed process left is removed when the next one makes its own."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.path = Path(tempfile.gettempdir(), prefix + secrets.token_hex(8))
        self._lock: int | None = None
        self._process = os.getpid()

    def make(self) -> None:
        """Raises OSError where there is no room for it."""
        for old in self.path.parent.glob(f"{self.prefix}*"):
            _remove_abandoned(old)
        self.path.mkdir(mode=0o700)
        self._lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        _locked(self._lock)

    def remove(self) -> None:
        """With all that is in it. A copy of the process, made by ``fork``, removes nothing."""
        if self._process != os.getpid():
            return
        shutil.rmtree(self.path, ignore_errors=True)
        lock, self._lock = self._lock, None
        if lock is not None:
            os.close(lock)


def _locked(file: int) -> bool:
    """Take the lock, which ends with the process, however that ends. False: another has it, or there are no locks here (Windows)."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False
    return True


def _remove_abandoned(folder: Path) -> None:
    with suppress(OSError):
        if folder.is_symlink() or not hasattr(os, "getuid") or folder.stat().st_uid != os.getuid():
            return
        lock = os.open(folder / "lock", os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
        try:
            if _locked(lock):
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(lock)
