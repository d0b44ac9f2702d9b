"""Measuring what a checkpoint can do."""
