"""Utilities for all rooms: files, locks, checks, offloading, versions of transformers."""
