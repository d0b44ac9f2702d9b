"""The rooms of the pipeline: requests, calls, conversations and videos."""
