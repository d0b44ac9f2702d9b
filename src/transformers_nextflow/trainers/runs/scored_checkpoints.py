"""Scores a training's checkpoints while it runs, in a separate process that only reads its folder."""

from __future__ import annotations

import csv
import os
import time
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageDraw

from ...evaluation.results import write_result
from ...evaluation.suites import SUITES
from ...utils.atomic_files import atomic_write
from ...utils.checkpoint_checks import read_json
from ...utils.typed_values import check_types
from .atomic_checkpoints import checkpoints_in, is_superseded, step_of
from .sharded_checkpoints import PARTS


CURVE, SCORES = "curve", "scores.json"
COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#7f7f7f")
WIDTH, HEIGHT, MARGIN = 640, 320, 40


class CheckpointScores:
    """Scores each `checkpoint-STEP` of a training's folder once, as it appears.

    In `output`, `checkpoint-STEP/scores.json` holds suite → category → score with their origin, beside the suite's
    sheets of images; it is written atomically. `curve.csv` has a line for each step, and `curve.png` shows it. A
    checkpoint whose weights were written again, or that was scored with other settings, is scored anew. Checkpoints
    that a newer training in the same folder superseded are left out.

    Args:
        run: the folder of the training; `from_pretrained` must be able to read its checkpoints.
        suite: a name of `SUITES`.
        output: default: `evaluation/SUITE` in `run`.
        limit, seeds, device: arguments of the suite.

    Raises:
        ValueError: for an unknown suite, and if `run` is no folder.
    """

    def __init__(
        self,
        run: Path | str,
        suite: str = "shapes",
        output: Path | str | None = None,
        limit: int | None = None,
        seeds: int = 4,
        device: str | None = None,
    ):
        if not Path(run).is_dir():
            raise ValueError(f"{run} is not a folder; name that of a training (--output), which holds its checkpoints.")
        self.run, self.evaluate, self.device = Path(run), SUITES[suite], device
        self.output = Path(output) if output is not None else self.run / "evaluation" / suite
        self.settings = {"suite": suite, "limit": limit, "seeds": seeds}

    def update(self) -> Iterator[int]:
        """Score the checkpoints without scores, the oldest first; yields the step of each."""
        while (checkpoint := next(self._unscored(), None)) is not None:
            try:
                self._score(checkpoint)
            except Exception:
                if checkpoint.exists():
                    raise
                continue  # the training has deleted it
            self._write_curve()
            yield step_of(checkpoint)

    def watch(self, every: float = 60.0) -> Iterator[int]:
        """Repeats `update` until the training has written `final` and all checkpoints are scored.

        Args:
            every: seconds to wait between two looks into the folder.
        """
        while True:
            is_finished = self._is_finished()  # before the last update, so that no checkpoint is missed
            yield from self.update()
            if is_finished:
                return
            time.sleep(every)

    def scores(self) -> dict[int, dict]:
        """The scores with these settings: step → suite → category → score, ordered by steps."""
        found = {}
        for folder in checkpoints_in(self.output):
            stored = _read(folder / SCORES)
            if stored.get("settings") == self.settings:
                found[step_of(folder)] = stored["scores"]
        return found

    def check_has_checkpoints(self):
        """Raises `ValueError` where there is no checkpoint."""
        if not self._checkpoints():
            raise ValueError(f"{self.run} holds no checkpoint-STEP; name the folder of a training (--output).")

    def progress_note(self) -> str:
        """The note on an interrupt: how many checkpoints have been scored."""
        count = len(self.scores())
        return f"The scores of {count} checkpoints are kept in {self.output}; the same command continues."

    def _checkpoints(self) -> list[Path]:
        return [checkpoint for checkpoint in checkpoints_in(self.run) if not is_superseded(checkpoint)]

    def _unscored(self) -> Iterator[Path]:
        for checkpoint in self._checkpoints():
            path = self.output / checkpoint.name / SCORES
            stored = _read(path) if path.exists() else {}
            if (stored.get("settings"), stored.get("written")) != (self.settings, _written(checkpoint)):
                yield checkpoint

    def _score(self, checkpoint: Path):
        if (checkpoint / PARTS).exists():
            raise ValueError(
                f"{checkpoint} holds sharded weights, which a single process cannot read; train with "
                "fsdp_state_dict_type=FULL_STATE_DICT to have its checkpoints scored, or score its final."
            )
        with atomic_write(self.output / checkpoint.name) as partial:
            partial.mkdir()
            written = _written(checkpoint)
            options = {name: self.settings[name] for name in ("limit", "seeds")}
            scores = self.evaluate(str(checkpoint), **options, sheets=partial, device=self.device)
            values = {"step": step_of(checkpoint), "settings": self.settings, "written": written, "scores": scores}
            write_result(partial / SCORES, values)

    def _is_finished(self) -> bool:
        final = self.run / "final"
        newest = max((_written(path) for path in self._checkpoints()), default=0)
        return final.is_dir() and _written(final) >= newest

    def _write_curve(self):
        rows = {step: dict(_flat(scores)) for step, scores in self.scores().items()}
        names = list(dict.fromkeys(name for row in rows.values() for name in row))
        with atomic_write(self.output / f"{CURVE}.csv") as partial, open(partial, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["step", *names])
            writer.writerows([step, *(row.get(name, "") for name in names)] for step, row in rows.items())
        with atomic_write(self.output / f"{CURVE}.png") as partial:
            _curves(rows, [name for name in names if _is_share(name, rows)]).save(partial)


def _read(path: Path) -> dict:
    """What was stored of a checkpoint. Raises `ValueError` that names the file for anything else."""
    stored = read_json(path)
    try:
        check_types(stored, {"settings": dict, "scores": dict, "written": int}, str(path))
        if missing := [name for name in ("settings", "scores", "written") if name not in stored]:
            raise ValueError(f"{path} lacks {missing[0]}.")
    except ValueError as error:
        raise ValueError(f"{error} Remove its folder, and the checkpoint is scored again.") from error
    return stored


def _written(folder: Path) -> int:
    """When the newest file of a folder was written, in nanoseconds; 0 for a folder that was deleted."""
    try:
        return max((entry.stat().st_mtime_ns for entry in os.scandir(folder) if entry.is_file()), default=0)
    except FileNotFoundError:
        return 0


def _flat(scores: dict, prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in scores.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            yield f"{prefix}{name}", value


def _is_share(name: str, rows: dict[int, dict[str, float]]) -> bool:
    """Whether a score is between 0 and 1 at all steps; only such scores are drawn in the same plot."""
    return all(0 <= row[name] <= 1 for row in rows.values() if name in row)


def _curves(rows: dict[int, dict[str, float]], names: list[str]) -> Image.Image:
    """A line for each score over the steps, from 0 to 1, with the names and last values below."""
    image = Image.new("RGB", (WIDTH, HEIGHT + 14 * len(names) + MARGIN), "white")
    pen, last = ImageDraw.Draw(image), max(rows)
    pen.rectangle([MARGIN, MARGIN, WIDTH - MARGIN, HEIGHT - MARGIN], outline="#999999")
    for text, place in (("1", (MARGIN - 12, MARGIN)), ("0", (MARGIN - 12, HEIGHT - MARGIN - 10))):
        pen.text(place, text, fill="black")
    pen.text((WIDTH - MARGIN - 60, HEIGHT - MARGIN + 4), f"step {last}", fill="black")
    for index, name in enumerate(names):
        color = COLORS[index % len(COLORS)]
        points = [
            (
                MARGIN + (WIDTH - 2 * MARGIN) * step / max(last, 1),
                HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * row[name],
            )
            for step, row in rows.items()
            if name in row
        ]
        pen.line(points, fill=color, width=2)
        for x, y in points:
            pen.ellipse([x - 2, y - 2, x + 2, y + 2], fill=color)
        value = next(row[name] for row in reversed(list(rows.values())) if name in row)
        pen.text((MARGIN, HEIGHT + 14 * index), f"{name}: {value:.3f}", fill=color)
    return image
