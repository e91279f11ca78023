"""Families of kind other."""
