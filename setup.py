"""Build hook: a wheel carries the data folders, which lie beside the package in a checkout, as ``planner/_data``.

Everything else about the build is in pyproject.toml; ``planner.resources.data_path`` finds either place.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
SHIPPED = ("profiles", "calibration/published", "calibration/coefficients", "calibration/README.md")


class BuildWithData(build_py):
    """Copies the data folders after the modules; raw calibration runs stay in the repository."""

    def run(self):
        super().run()
        if self.editable_mode:
            return
        for name in SHIPPED:
            source, target = ROOT / name, Path(self.build_lib, "planner", "_data", name)
            if source.is_dir():
                shutil.rmtree(target, ignore_errors=True)
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
            elif source.is_file():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target)


setup(cmdclass={"build_py": BuildWithData})
