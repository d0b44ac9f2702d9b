"""Bad inputs and what becomes of them: the form of a case, and how its outcome is told."""

from __future__ import annotations

import json
import os
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from unittest import mock

import numpy as np
from command_line import run_command
from PIL import Image
from tiny import tiny_model, tiny_processor

from transformers_nextflow import NextFlowPipeline


# What may become of an input. The first three are asked for.
RIGHT, REFUSED, WARNED = "right", "refused", "warned"
TRACEBACK, UNHELPFUL, ACCEPTED, LOST, HUNG = "traceback", "unhelpful", "accepted", "lost", "hung"
SECONDS = 30
BUNDLED = Path(__file__).parents[2] / "checkpoints" / "nextflow-shapes"


@dataclass(frozen=True)
class Case:
    """One bad input.

    Args:
        kind: of fault, one of `KINDS`.
        name: of the case, unlike all others.
        act: gives the input; raises what the user would see, or returns the result of the command line. An
            `AssertionError` says that work was lost.
        words: all of which the error or the warning must hold.
        expected: "refused", "warned" or "right".
    """

    kind: str
    name: str
    act: Callable[[Place], object]
    words: tuple[str, ...] = ()
    expected: str = REFUSED


@dataclass
class Place:
    """An empty folder to be in, a tiny model, and its pipeline."""

    folder: Path
    model: Path
    shared: dict = field(default_factory=dict)

    @cached_property
    def image(self) -> Path:
        return self.png("own.png")

    @property
    def pipe(self) -> NextFlowPipeline:
        return self._shared("pipe", self.model)

    @property
    def shapes(self) -> NextFlowPipeline:
        """The bundled checkpoint, anew: warnings come once for each pipeline."""
        loaded = self._shared("shapes", BUNDLED)
        return NextFlowPipeline(loaded.model, loaded.processor)

    def _shared(self, name: str, model: Path) -> NextFlowPipeline:
        if name not in self.shared:
            self.shared[name] = NextFlowPipeline.from_pretrained(model)
            self.shared[name].set_progress_bar_config(disable=True)
        return self.shared[name]

    def png(self, name: str, size=(16, 16)) -> Path:
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(name)
        return self.folder / name

    def file(self, name: str, content: str | bytes | dict | list = "") -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps(content) if isinstance(content, dict | list) else content
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def rows(self, *rows, name: str = "rows.jsonl") -> Path:
        return self.file(name, "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))

    def copy(self, name: str = "model") -> Path:
        """The tiny model's folder, to be damaged."""
        return Path(shutil.copytree(self.model, self.folder / name))

    def run(self, *arguments):
        return run_command(*arguments)

    def draw(self, *arguments):
        """`generate` with the tiny model and a short prompt."""
        return self.run("generate", "a red circle", "--model", self.model, *arguments)


def make_model(folder: Path) -> Path:
    model, processor = tiny_model(), tiny_processor()
    model.generation_config.eos_token_id = -1
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    # A checkpoint without its own settings is warned of.
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(config | {"image_sampling": {"guidance_scale": 1.0}}))
    return folder


def outcome(case: Case, place: Place) -> tuple[str, str]:
    """What becomes of a case, and what its user sees."""
    before = os.getcwd()
    os.chdir(place.folder)
    try:
        with warnings.catch_warnings(record=True) as warned, time_limit(SECONDS):
            warnings.simplefilter("always")
            result = case.act(place)
    except AssertionError as error:
        return LOST, str(error)
    except TimeoutError as error:
        return HUNG, str(error)
    except (OSError, ValueError) as error:
        return _told(case, str(error), one_line=False)
    except Exception as error:
        return TRACEBACK, f"{type(error).__name__}: {error}"
    finally:
        os.chdir(before)
    if hasattr(result, "exit_code") and result.exit_code != 0:
        return _of_command(case, result)
    told = " ".join(str(warning.message) for warning in warned)
    if case.expected == WARNED:
        return (WARNED if all(word in told for word in case.words) else ACCEPTED), told
    return (RIGHT if case.expected == RIGHT else ACCEPTED), told


def _of_command(case: Case, result) -> tuple[str, str]:
    if not isinstance(result.exception, SystemExit) or "Traceback" in result.stderr:
        if isinstance(result.exception, TimeoutError):
            return HUNG, "TimeoutError"
        return TRACEBACK, f"{type(result.exception).__name__}: {result.exception}"
    usage = "Usage:" in result.stderr
    lines = result.stderr.strip().splitlines() or [""]
    return _told(case, " ".join(lines) if usage else lines[-1], one_line=not usage)


def _told(case: Case, message: str, one_line: bool) -> tuple[str, str]:
    plain = not one_line or message.startswith(("Error: ", "Interrupted. "))
    helps = plain and "unexpected;" not in message and all(word in message for word in case.words)
    return (REFUSED if helps and len(message) < 3000 else UNHELPFUL), message


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def end(number, frame):
        raise TimeoutError(f"nothing after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def failing(error: BaseException, after: int = 0):
    """A function that raises an error from its call number `after` on."""
    calls = iter(range(after))

    def fail(original, *args, **kwargs):
        if next(calls, None) is None:
            raise error
        return original(*args, **kwargs)

    return fail


@contextmanager
def broken(holder, name: str, error: BaseException, after: int = 0) -> Iterator[None]:
    """`holder.name` raises an error, from its call number `after` on."""
    original, fail = getattr(holder, name), failing(error, after)
    with mock.patch.object(holder, name, lambda *args, **kwargs: fail(original, *args, **kwargs)):
        yield
