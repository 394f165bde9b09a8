"""Gradients arrive where they should."""
