"""Serving by HTTP, as clients of OpenAI's API know it, on Ray Serve (docs/serving.md)."""
