"""OneCAT-3B as it was released, to a folder that `NextFlowPipeline.from_pretrained` draws with; and back.

    python conversion/convert_onecat.py OneCAT-3B onecat-3b --vision-tokenizer infinity_vae_d32reg.pth
    python conversion/convert_onecat.py onecat-3b OneCAT-3B-again --back

`--vision-tokenizer` is Infinity's file. The key tables are `KEYS` and `VQ_KEYS` in
`transformers_nextflow.conversion.onecat`.
"""

from pathlib import Path
from typing import Annotated

import typer

from transformers_nextflow.cli import errors_in_one_line
from transformers_nextflow.conversion.onecat import VISION_TOKENIZER, convert_onecat, export_onecat
from transformers_nextflow.conversion.verification import verify as verified


def main(
    source: Annotated[Path, typer.Argument(help="The released folder; with --back a converted one.")],
    output: Annotated[Path, typer.Argument(help="Folder that is made.")],
    vision_tokenizer: Annotated[Path | None, typer.Option(help=f"File of Infinity's: {VISION_TOKENIZER}.")] = None,
    back: Annotated[bool, typer.Option("--back", help="Write the released layout again.")] = False,
    base_model: Annotated[str | None, typer.Option(help="Repository of the source, for the model card.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Of a file of weights.")] = "2GB",
    verify: Annotated[bool, typer.Option("--verify", help="Draw and read a fixed set, and print a report.")] = False,
):
    """Convert OneCAT. Run it again to continue after an interruption."""
    with errors_in_one_line():
        if back:
            if vision_tokenizer is not None or base_model is not None or verify:
                raise ValueError("--back takes neither --vision-tokenizer, --base-model nor --verify; leave them out.")
            export_onecat(source, output, max_shard_size)
        elif vision_tokenizer is None:
            raise ValueError(f"Give --vision-tokenizer, the file {VISION_TOKENIZER} of Infinity.")
        else:
            convert_onecat(source, vision_tokenizer, output, max_shard_size, base_model)
        typer.echo(f"Written and checked: {output}")
        if verify:
            typer.echo(verified(output))


if __name__ == "__main__":
    typer.run(main)
