"""A file is written whole or not at all."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest

from planner.files import ScratchFolder, replacing, write_text


def test_a_new_file_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text("old")
    write_text(path, "neu: größer\n")
    assert path.read_bytes() == "neu: größer\n".encode()
    assert os.listdir(tmp_path) == ["plan.json"]


def test_what_fails_half_way_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as file:
        _interrupted(file)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["plan.json"]


def _interrupted(file: IO[bytes]) -> None:
    file.write(b"half")
    raise KeyboardInterrupt


def test_a_disk_that_fills_on_the_last_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    path.write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["plan.json"]


def test_a_link_is_followed_and_a_device_written_to(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old")
    link.symlink_to(target)
    write_text(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    write_text(Path("/dev/null"), "gone")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_others_may_read_it_as_any_file_of_the_user(tmp_path: Path) -> None:
    plain, written = tmp_path / "plain", tmp_path / "written"
    plain.write_text("x")
    write_text(written, "x")
    assert written.stat().st_mode == plain.stat().st_mode


HOLDER = """
import os, sys, tempfile
from planner.files import ScratchFolder
tempfile.tempdir = sys.argv[1]
folder = ScratchFolder("weights-")
folder.make()
(folder.path / "large").write_bytes(bytes(100))
if os.fork() == 0:
    folder.remove()  # a copy of the process: not its own
    os._exit(0)
os.wait()
print(folder.path, flush=True)
sys.stdin.readline()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="locks and signals are POSIX")
def test_what_a_killed_process_left_is_removed_and_what_others_use_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    killed, alive = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert killed.stdout is not None
    assert alive.stdout is not None
    left, used = Path(killed.stdout.readline().strip()), Path(alive.stdout.readline().strip())
    killed.kill()
    killed.communicate(timeout=60)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "weights-link").symlink_to(tmp_path / "elsewhere")
    own = ScratchFolder("weights-")
    own.make()
    assert own.path.stat().st_mode & 0o777 == 0o700
    assert not left.exists()
    assert (used / "large").exists()
    own.remove()
    own.remove()
    alive.communicate("\n", timeout=60)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["elsewhere", "weights-link", used.name])
