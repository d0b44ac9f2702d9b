"""NextFlow's own release → this package; a slot that waits for it, since no weights have been published.

    python conversion/convert_nextflow.py FILE

It lists what the file holds and how far that matches (`transformers-nextflow inspect FILE` does the same). To fill it:
write the release's key patterns into `NEXTFLOW_KEYS`, then read, map, check and write as
`convert_tokenflow_t2i.py` does.
"""

from pathlib import Path
from typing import Annotated

import typer

from transformers_nextflow.cli import errors_in_one_line
from transformers_nextflow.conversion.checkpoints import KeyMap
from transformers_nextflow.conversion.report import layout_of, report


# The release's key → ours, each `*` for any text.
NEXTFLOW_KEYS: dict[str, str] = {}


def main(file: Annotated[Path, typer.Argument(help="A file of weights, or the folder of a model.")]):
    """Say what the key table still lacks for a file of the release."""
    with errors_in_one_line():
        typer.echo(report(file))
        if not NEXTFLOW_KEYS:
            raise ValueError("NEXTFLOW_KEYS is empty, since there is no release yet; fill it from the list above.")
        KeyMap(NEXTFLOW_KEYS).forward(layout_of(file))


if __name__ == "__main__":
    typer.run(main)
