"""Training data: rows of messages, texts, pictures and films, checked and encoded ahead of time (docs/data.md)."""

from .code_extraction import check_codes, extract_codes
from .rows import BadRowError, Sample, load_picture, open_rows, read_row
from .validation import ValidationReport, validate_rows
from .vision_tokenizer import load_vision_tokenizer, tokenizer_fingerprint


__all__ = [
    "BadRowError",
    "Sample",
    "ValidationReport",
    "check_codes",
    "extract_codes",
    "load_vision_tokenizer",
    "load_picture",
    "open_rows",
    "read_row",
    "tokenizer_fingerprint",
    "validate_rows",
]
