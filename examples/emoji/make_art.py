"""Fetch the emoji sets from npm, check them by hash, and render them once into an archive of drawings.

    python examples/emoji/make_art.py --output runs/emoji/art.zip

The script downloads 32 MB and renders about 19,000 drawings, skin tones included, in five to fifteen minutes on a core.
The archive holds the NOTICE with the licences of all sets.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers_nextflow.worlds.emoji.art import SIDE, make_art
from transformers_nextflow.worlds.emoji.packages import fetch


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/emoji/art.zip"))
    parser.add_argument(
        "--packages", type=Path, default=Path("runs/emoji/packages"), help="folder in which the tarballs are kept"
    )
    parser.add_argument("--side", type=int, default=SIDE, help="side of a drawing in pixels")
    arguments = parser.parse_args()
    fetch(arguments.packages)
    counts = make_art(arguments.packages, arguments.output, arguments.side)
    for style, count in counts.items():
        print(f"{style:<12}{count:>6}")
    print(f"{sum(counts.values())} drawings in {arguments.output}, {arguments.output.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
