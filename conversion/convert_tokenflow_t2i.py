"""TokenFlow-t2i as it was released, to a folder that `NextFlowPipeline.from_pretrained` draws with; and back.

    python conversion/convert_tokenflow_t2i.py TokenFlow-t2i tokenflow-t2i --vision-tokenizer tokenflow-clipb-256
    python conversion/convert_tokenflow_t2i.py tokenflow-t2i TokenFlow-t2i-again --back

`--vision-tokenizer` is what `convert_tokenflow.py … --interpolate` made of `tokenflow_clipb_32k_enhanced.pt`. The key
table is `KEYS` in `transformers_nextflow.conversion.tokenflow_t2i`.
"""

from pathlib import Path
from typing import Annotated

import typer

from transformers_nextflow.cli import errors_in_one_line
from transformers_nextflow.conversion.tokenflow_t2i import convert_tokenflow_t2i, export_tokenflow_t2i
from transformers_nextflow.conversion.verification import verify as verified


def main(
    source: Annotated[Path, typer.Argument(help="The released folder; with --back a converted one.")],
    output: Annotated[Path, typer.Argument(help="Folder that is made.")],
    vision_tokenizer: Annotated[Path | None, typer.Option(help="Folder of the converted vision tokenizer.")] = None,
    back: Annotated[bool, typer.Option("--back", help="Write the released layout again.")] = False,
    base_model: Annotated[str | None, typer.Option(help="Repository of the source, for the model card.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Of a file of weights.")] = "2GB",
    verify: Annotated[bool, typer.Option("--verify", help="Draw and read a fixed set, and print a report.")] = False,
):
    """Convert TokenFlow-t2i. Run it again to continue after an interruption."""
    with errors_in_one_line():
        if back:
            if vision_tokenizer is not None or base_model is not None or verify:
                raise ValueError("--back takes neither --vision-tokenizer, --base-model nor --verify; leave them out.")
            export_tokenflow_t2i(source, output, max_shard_size)
        elif vision_tokenizer is None:
            raise ValueError("Give --vision-tokenizer, the folder of the converted vision tokenizer.")
        else:
            convert_tokenflow_t2i(source, vision_tokenizer, output, max_shard_size, base_model)
        typer.echo(f"Written and checked: {output}")
        if verify:
            typer.echo(verified(output))


if __name__ == "__main__":
    typer.run(main)
