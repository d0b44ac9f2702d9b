"""Turns exceptions on the command line into one line."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import typer
from huggingface_hub.errors import StrictDataclassError
from jinja2 import TemplateError
from safetensors import SafetensorError
from yaml import YAMLError


# If this variable is set, errors keep their tracebacks.
DEBUG = "TRANSFORMERS_NEXTFLOW_DEBUG"
# Errors that a user can correct, besides errors of the system; libraries have their own classes for broken files.
USER_ERRORS = (ImportError, OSError, SafetensorError, StrictDataclassError, TemplateError, ValueError, YAMLError)
# Left to typer.
HANDLED_BY_TYPER = (BrokenPipeError, typer.Abort, typer.BadParameter, typer.Exit)
MAX_CHARACTERS = 1000


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Prints exceptions of the block in one line on stderr, without a traceback; the environment variable `DEBUG` shows
    the traceback.

    The exit code is 2 for errors that a user can correct, 1 for others, and 128 plus its number after a signal.
    """
    try:
        yield
    except HANDLED_BY_TYPER:
        raise
    except (Exception, KeyboardInterrupt) as error:
        if os.environ.get(DEBUG):
            raise
        if isinstance(error, KeyboardInterrupt) or _open_progress_bars():
            print(file=sys.stderr)  # after the terminal's own ^C, or the bar of the work
        print(one_line(error), file=sys.stderr)
        raise typer.Exit(_exit_code(error)) from error


def one_line(error: BaseException) -> str:
    """The line for the user; for an unexpected error it names the class and how to see the traceback."""
    message = " ".join(part for part in [str(error), *getattr(error, "__notes__", ())] if part)
    # Halves of surrogate pairs, which names of files may hold, cannot be printed.
    message = " ".join(message.encode("utf-8", "backslashreplace").decode().split()) or type(error).__name__
    if len(message) > MAX_CHARACTERS:
        message = f"{message[: MAX_CHARACTERS // 2]} … {message[-MAX_CHARACTERS // 2 :]}"
    if isinstance(error, KeyboardInterrupt):
        return f"Interrupted. {' '.join(getattr(error, '__notes__', ())) or 'Nothing was written.'}"
    if _is_out_of_memory(error):
        return (
            f"Error: The memory is full: {message}; take fewer or smaller images, a smaller batch, or another device."
        )
    if isinstance(error, USER_ERRORS):
        return f"Error: {message}"
    return f"Error: {type(error).__name__}: {message} (unexpected; {DEBUG}=1 shows where)"


@contextmanager
def note_on_interrupt(kept: Callable[[], str]) -> Iterator[None]:
    """If the block is interrupted, such as by Ctrl-C, adds a note to the exception that says what is kept of its
    work.
    """
    try:
        yield
    except KeyboardInterrupt as interrupt:
        interrupt.add_note(kept())
        raise


def _open_progress_bars() -> Collection:
    """The bars of work that is not done, which leave the cursor at the end of their line."""
    return getattr(getattr(sys.modules.get("tqdm"), "tqdm", None), "_instances", ())


def _exit_code(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return 128 + (error.args[0] if error.args else signal.SIGINT)
    return 2 if isinstance(error, USER_ERRORS) or _is_out_of_memory(error) else 1


def _is_out_of_memory(error: BaseException) -> bool:
    # Torch's own class is compared by name, since commands that need no torch do not import it.
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
