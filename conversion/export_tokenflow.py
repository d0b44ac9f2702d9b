"""`NextFlowVQModel` of TokenFlow's kind → a file in TokenFlow's layout.

    python conversion/export_tokenflow.py tokenizer tokenflow.pt

The key table is the one of `convert_tokenflow.py`, read backwards.
"""

from pathlib import Path
from typing import Annotated

import typer

from transformers_nextflow.cli import errors_in_one_line
from transformers_nextflow.conversion.tokenflow import export_tokenflow


def main(
    source: Annotated[Path, typer.Argument(help="Folder of a NextFlowVQModel.")],
    output: Annotated[Path, typer.Argument(help="File that is made.")],
):
    """Write a tokenizer in TokenFlow's layout."""
    with errors_in_one_line():
        export_tokenflow(source, output)
    typer.echo(f"Written and checked: {output}")


if __name__ == "__main__":
    typer.run(main)
