"""The text backbone of a NextFlow → Qwen2.5-VL, for serving engines; the inverse of convert_qwen2_5_vl.py.

python conversion/export_qwen2_5_vl.py nextflow Qwen2.5-VL-7B-Instruct nextflow-text
"""

from pathlib import Path
from typing import Annotated

import typer

from transformers_nextflow.cli import errors_in_one_line
from transformers_nextflow.conversion.qwen2_5_vl import export_qwen2_5_vl


def main(
    source: Annotated[Path, typer.Argument(help="Folder of a NextFlow.")],
    original: Annotated[Path, typer.Argument(help="Folder of the Qwen2.5-VL it started from, for its vision tower.")],
    output: Annotated[Path, typer.Argument(help="Folder that is made.")],
    base_model: Annotated[str | None, typer.Option(help="Repository of the NextFlow, for the model card.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Of a file of weights.")] = "2GB",
):
    """Write a Qwen2.5-VL with the text backbone of a NextFlow. Run it again to continue after an interruption."""
    with errors_in_one_line():
        export_qwen2_5_vl(source, original, output, base_model, max_shard_size)
    typer.echo(f"Written and checked: {output}")


if __name__ == "__main__":
    typer.run(main)
