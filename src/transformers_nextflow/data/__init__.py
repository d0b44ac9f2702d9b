"""Training data: rows of messages, texts, images and videos, their checks, and extraction of codes (docs/data.md)."""

from ..vision_tokenizer.fingerprint import tokenizer_fingerprint
from .code_extraction import check_codes, extract_codes
from .columns import Columns
from .row_codes import EncodedImage, RowCodes, code_fields, encoded_images
from .row_errors import BadRowError
from .rows import Sample, load_image, read_row
from .sources import open_rows
from .validation import ValidationReport, validate_rows
from .vision_tokenizer import load_vision_tokenizer


__all__ = [
    "BadRowError",
    "Columns",
    "EncodedImage",
    "RowCodes",
    "Sample",
    "ValidationReport",
    "check_codes",
    "code_fields",
    "encoded_images",
    "extract_codes",
    "load_vision_tokenizer",
    "load_image",
    "open_rows",
    "read_row",
    "tokenizer_fingerprint",
    "validate_rows",
]
