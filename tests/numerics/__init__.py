"""Numbers are right."""
