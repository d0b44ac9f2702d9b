"""Files of measured figures, with command, commit and machine."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import torch
import transformers

from ..utils.atomic_files import write_with_fallback


def write_result(path: Path | str, values: dict, device: str = "cpu") -> Path:
    """Write `values` and their origin (command, commit, machine) as JSON; returns the path.

    Raises:
        OSError: if it cannot be written there; the message says where it was written instead.
    """
    path = Path(path)
    script = ["python", sys.argv[0]] if sys.argv[0].endswith(".py") else [Path(sys.argv[0]).name]
    origin = {"command": shlex.join([*script, *sys.argv[1:]]), "commit": commit(), "machine": machine(device)}
    write_with_fallback(path, lambda partial: partial.write_text(json.dumps(values | origin, indent=2) + "\n"))
    return path


def commit() -> str | None:
    """The commit of this checkout, with `-dirty` if files differ from it; `None` outside of a repository."""
    revision = _git("rev-parse", "--verify", "HEAD")
    # Results of benchmarks, their images and sheets of scored images do not count as changes of the code.
    results = [
        f":(exclude,top,glob){files}" for files in ("benchmarks/results/**", "checkpoints/**/*.png", "docs/**/*.png")
    ]
    changed = _git("status", "--porcelain", "--", ":/", *results)
    return revision and revision + ("-dirty" if changed else "")


def machine(device: str = "cpu") -> dict:
    """The machine and the versions of libraries, on which figures depend besides the code."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
