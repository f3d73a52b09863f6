"""Codes that make good each other's errors, layer by layer."""
