"""Where the data folders ``profiles/`` and ``calibration/`` are: in an installed wheel or beside the checkout."""

from __future__ import annotations

from pathlib import Path

from planner.errors import ProfileError

_PACKAGE = Path(__file__).resolve().parent
_ROOTS = (_PACKAGE / "_data", _PACKAGE.parent)
"""A wheel carries the folders in ``planner/_data`` (setup.py copies them); a checkout has them beside ``planner/``."""


def data_path(*parts: str) -> Path:
    """The bundled file or folder, such as ``data_path("profiles", "gpus")``.

    Raises:
        ProfileError: it is in neither place.
    """
    for root in _ROOTS:
        candidate = root.joinpath(*parts)
        if candidate.exists():
            return candidate
    looked, wanted = " or ".join(map(str, _ROOTS)), "/".join(parts)
    raise ProfileError(f"bundled data {wanted} is missing; looked in {looked}. Reinstall the package.")
