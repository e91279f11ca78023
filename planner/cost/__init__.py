"""Pure functions of trace, facts, device, coefficients and recipe; one function per term. Imports no torch."""
