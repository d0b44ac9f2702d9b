"""A server with OpenAI's API on Ray Serve (docs/serving.md)."""
