"""Measurements of this project's promises. Not part of the installed package; run from a checkout."""
