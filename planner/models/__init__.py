"""Models known before they are loaded: live pipelines, local folders, hub ids and bundled profiles.

:func:`resolve` answers without importing torch for everything but a live pipeline; :meth:`ModelSource.build` imports
torch and diffusers and puts every weight on the ``meta`` device. No remote code is ever run.
"""

from planner.models.bundled import ModelProfile, list_profiles
from planner.models.source import ModelSource, resolve

__all__ = ["ModelProfile", "ModelSource", "list_profiles", "resolve"]
