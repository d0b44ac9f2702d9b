"""SigLIP2 NaFlex or SigLIP → a fresh vision tokenizer with that semantic encoder.

    python conversion/convert_siglip2.py siglip2-so400m-patch16-naflex tokenizer-start

The key table is `SIGLIP_KEYS` in `transformers_nextflow.conversion.siglip2`.
"""

from pathlib import Path
from typing import Annotated

import typer

from transformers_nextflow.cli import errors_in_one_line
from transformers_nextflow.conversion.checkpoints import read_vq_config
from transformers_nextflow.conversion.siglip2 import convert_siglip2
from transformers_nextflow.conversion.verification import verify as verified


def main(
    source: Annotated[Path, typer.Argument(help="Folder of a SigLIP2 NaFlex or a SigLIP, as on the Hub.")],
    output: Annotated[Path, typer.Argument(help="Folder that is made.")],
    vision_config: Annotated[Path | None, typer.Option(help="Folder of its config; default: the large one's.")] = None,
    base_model: Annotated[str | None, typer.Option(help="Repository of the source, for the model card.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32, help="Of the parts that are new.")] = 0,
    verify: Annotated[bool, typer.Option("--verify", help="Draw and read a fixed set, and print a report.")] = False,
):
    """Start a vision tokenizer from a vision tower."""
    with errors_in_one_line():
        vq_config = read_vq_config(vision_config) if vision_config else None
        convert_siglip2(source, output, vq_config, base_model, seed)
        typer.echo(f"Written and checked: {output}")
        if verify:
            typer.echo(verified(output))


if __name__ == "__main__":
    typer.run(main)
