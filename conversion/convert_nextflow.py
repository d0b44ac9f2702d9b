"""NextFlow's own release → this package; a slot that waits for it, since no weights have been published.

    python conversion/convert_nextflow.py FILE

It lists what the file holds and how far that matches (`transformers-nextflow inspect FILE` does the same). The key
table to fill is `NEXTFLOW_KEYS` in `transformers_nextflow.conversion.nextflow_release`.
"""

from pathlib import Path
from typing import Annotated

import typer

from transformers_nextflow.cli import errors_in_one_line
from transformers_nextflow.conversion.nextflow_release import check_release
from transformers_nextflow.conversion.report import report


def main(file: Annotated[Path, typer.Argument(help="A file of weights, or the folder of a model.")]):
    """Say what the key table still lacks for a file of the release."""
    with errors_in_one_line():
        typer.echo(report(file))
        check_release(file)


if __name__ == "__main__":
    typer.run(main)
