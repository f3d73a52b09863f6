"""Codes that compensate for each other's errors, layer by layer."""
