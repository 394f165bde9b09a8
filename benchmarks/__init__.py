"""fastbn measured against what the user has today: ``python -m benchmarks``."""
