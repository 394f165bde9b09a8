"""Batch norms that share statistics with other processes."""
