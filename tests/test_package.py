"""The wheel, installed into an environment of its own: it brings its data, its types and its command."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("planner", "profiles", "calibration", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the sources, without isolation: nothing is fetched."""
    import shutil

    work = tmp_path_factory.mktemp("build")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, work / name, ignore=shutil.ignore_patterns("__pycache__", "runs"))
        else:
            shutil.copy2(source, work / name)
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--no-index", "-q", "-w", "dist"]
    done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (found,) = (work / "dist").glob("*.whl")
    return found


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new virtual environment that has the wheel, and sees this one's dependencies after its own packages."""
    folder = tmp_path_factory.mktemp("clean") / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    site = Path(subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"], capture_output=True, text=True,
                               check=True).stdout.strip())  # fmt: skip
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", "-q", str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder


def run_there(environment: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The installed command in an empty folder, with nothing of this checkout on its path."""
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    clean |= {"PLANNER_CACHE_DIR": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    command = [str(environment / "bin" / words[0]), *words[1:]]
    return subprocess.run(command, cwd=folder, env=clean, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_wheel_holds_code_data_types_and_licence(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    data = ("profiles/gpus/ampere.toml", "profiles/models/stable-diffusion-xl/unet/config.json", "calibration/coefficients/defaults.toml",
            "calibration/published/published.csv")  # fmt: skip
    for wanted in ("planner/py.typed", "planner/knobs/offload.py", *(f"planner/_data/{name}" for name in data)):
        assert wanted in names
    assert any(name.endswith("LICENSE") for name in names)
    top = {name.split("/")[0] for name in names}
    assert len(top) == 2, f"only planner and its metadata belong into the wheel, not {top}"


@pytest.mark.slow
def test_installed_command_explains_from_an_empty_folder(environment: Path, tmp_path: Path) -> None:
    where = run_there(environment, tmp_path, "python", "-c", "import planner; print(planner.__file__)")
    assert str(environment) in where.stdout, where.stderr
    done = run_there(environment, tmp_path, "planner", "explain", "stable-diffusion-v1-5", "--gpu", "RTX 3060")
    assert done.returncode == 0, done.stderr
    assert "NVIDIA GeForce RTX 3060" in done.stdout
    assert done.stdout == run_there(environment, tmp_path, "planner", "explain", "stable-diffusion-v1-5", "--gpu", "RTX 3060").stdout
    listed = run_there(environment, tmp_path, "python", "-m", "planner", "profiles")
    assert "stable-diffusion-xl" in listed.stdout


def test_declared_dependencies_are_those_imported() -> None:
    """Every third-party module that planner imports is declared, and every declared one is imported somewhere."""
    import ast

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *(line for lines in project["optional-dependencies"].values() for line in lines)]
    declared = {line.split(">=")[0].split("<")[0].strip().replace("-", "_").lower() for line in wanted}
    imported = set()
    for path in (ROOT / "planner").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            imported |= {name.split(".")[0].lower() for name in names}
    outside = imported - {name.lower() for name in sys.stdlib_module_names} - {"planner"}
    provided_by = {"pynvml": "nvidia_ml_py", "pil": "diffusers"}  # Pillow is a dependency of diffusers
    assert {provided_by.get(name, name) for name in outside} <= declared


def test_package_is_marked_as_typed() -> None:
    assert (ROOT / "planner" / "py.typed").is_file()
