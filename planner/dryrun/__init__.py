"""Dry run: the pipeline's own code with its heavy modules on ``meta``. Import from the submodules; this imports no torch."""
