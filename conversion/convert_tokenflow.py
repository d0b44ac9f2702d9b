"""A tokenizer of TokenFlow → `NextFlowVQModel`.

    python conversion/convert_tokenflow.py tokenflow_siglip_32k.pt tokenizer
    python conversion/convert_tokenflow.py tokenflow_clipb_32k_enhanced.pt tokenizer --interpolate

The key table is `KEYS` in `transformers_nextflow.conversion.tokenflow`.
"""

from pathlib import Path
from typing import Annotated

import typer

from transformers_nextflow.cli import errors_in_one_line
from transformers_nextflow.conversion.tokenflow import convert_tokenflow
from transformers_nextflow.conversion.verification import verify as verified


def main(
    source: Annotated[Path, typer.Argument(help="A file of TokenFlow's, with its optimizers or without.")],
    output: Annotated[Path, typer.Argument(help="Folder that is made.")],
    interpolate: Annotated[bool, typer.Option(help="clipb: images of 256 pixels in place of 224.")] = False,
    semantic_heads: Annotated[int | None, typer.Option(help="Of the semantic encoder; default: the release's.")] = None,
    semantic_decoder_heads: Annotated[int | None, typer.Option(help="Default: the release's, 12.")] = None,
    base_model: Annotated[str | None, typer.Option(help="Repository of the source, for the model card.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Draw and read a fixed set, and print a report.")] = False,
):
    """Convert a tokenizer of TokenFlow."""
    with errors_in_one_line():
        convert_tokenflow(
            source,
            output,
            base_model,
            interpolate=interpolate,
            semantic_heads=semantic_heads,
            semantic_decoder_heads=semantic_decoder_heads,
        )
        typer.echo(f"Written and checked: {output}")
        if verify:
            typer.echo(verified(output))


if __name__ == "__main__":
    typer.run(main)
