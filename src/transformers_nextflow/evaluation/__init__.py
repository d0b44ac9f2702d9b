"""Metrics, results and suites for checkpoints."""
