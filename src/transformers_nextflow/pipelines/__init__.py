"""Parts of the pipeline: requests, calls, conversations and videos."""
