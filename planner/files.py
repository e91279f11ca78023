"""Writing a file whole or not at all: what was there stays until the new one is complete."""

from __future__ import annotations

import os
import secrets
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
