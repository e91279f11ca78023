"""Families of kind audio."""
