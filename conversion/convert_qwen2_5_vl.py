"""Qwen2.5-VL (3B, 7B, 32B, 72B) → a NextFlow to train.

    python conversion/convert_qwen2_5_vl.py Qwen2.5-VL-7B-Instruct nextflow-start --vision-tokenizer tokenizer

The key table is `QWEN_KEYS` in `transformers_nextflow.conversion.qwen2_5_vl`.
"""

from pathlib import Path
from typing import Annotated

import typer

from transformers_nextflow.cli import errors_in_one_line
from transformers_nextflow.conversion.checkpoints import read_vq_config
from transformers_nextflow.conversion.qwen2_5_vl import convert_qwen2_5_vl
from transformers_nextflow.conversion.verification import verify as verified


def main(
    source: Annotated[Path, typer.Argument(help="Folder of a Qwen2.5-VL, as on the Hub.")],
    output: Annotated[Path, typer.Argument(help="Folder that is made.")],
    vision_tokenizer: Annotated[Path | None, typer.Option(help="Folder of a trained vision tokenizer.")] = None,
    vision_config: Annotated[Path | None, typer.Option(help="Folder of a fresh one's config; default: 7B.")] = None,
    base_model: Annotated[str | None, typer.Option(help="Repository of the source, for the model card.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Of a file of weights.")] = "2GB",
    seed: Annotated[int, typer.Option(min=0, max=2**32, help="Of what is new.")] = 0,
    verify: Annotated[bool, typer.Option("--verify", help="Draw and read a fixed set, and print a report.")] = False,
):
    """Convert a Qwen2.5-VL into the start of a NextFlow. Run it again to continue after an interruption."""
    with errors_in_one_line():
        vq_config = read_vq_config(vision_config) if vision_config else None
        convert_qwen2_5_vl(source, output, vision_tokenizer, vq_config, base_model, max_shard_size, seed)
        typer.echo(f"Written and checked: {output}")
        if verify:
            typer.echo(verified(output))


if __name__ == "__main__":
    typer.run(main)
