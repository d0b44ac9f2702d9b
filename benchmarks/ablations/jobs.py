"""Jobs of an ablation. A job trains one arm with one seed; it runs once, in one of several processes, and its result is
kept on disk.

A job is identified by its settings, not by the code. After a change of the code, choose another folder or delete the
old one.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock
from tqdm import tqdm


Point = dict[str, float]


@dataclass(frozen=True)
class Budget:
    """The budget of a job: training steps, and scored prompts of each of the six categories."""

    steps: int
    prompts: int

    def __post_init__(self):
        if min(self.steps, self.prompts) < 1:
            raise ValueError(f"steps and prompts start at 1, got {self.steps} and {self.prompts}.")


@dataclass(frozen=True)
class Cache:
    """Keeps what several jobs or a later run of the command use, under the settings with which it was made."""

    root: Path

    def path(self, kind: str, settings: dict) -> Path:
        key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        return self.root / kind / key

    def folder(self, kind: str, settings: dict, make: Callable[[Path], None]) -> Path:
        """Returns the folder that `make` writes atomically. If several processes need it, one of them writes."""
        path = self.path(kind, settings)
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not path.exists():
                partial = path.with_suffix(".partial")
                shutil.rmtree(partial, ignore_errors=True)
                make(partial)
                partial.replace(path)
        return path


@dataclass(frozen=True)
class Job:
    """One training. `run(seed, budget, cache, **settings)` returns its curve: points with `step` and scores by name."""

    run: Callable[..., list[Point]]
    settings: dict
    seed: int
    budget: Budget

    def path(self, cache: Cache) -> Path:
        # The file's name is used because the module's name is __main__ in a script.
        run = f"{Path(self.run.__code__.co_filename).stem}.{self.run.__qualname__}"
        key = {"run": run, "settings": self.settings, "seed": self.seed, "budget": asdict(self.budget)}
        return cache.path("jobs", key).with_suffix(".json")

    def curve(self, cache: Cache) -> list[Point] | None:
        """Returns the curve that is kept on disk, or `None` before the job is done."""
        path = self.path(cache)
        return json.loads(path.read_text()) if path.exists() else None

    def do(self, cache: Cache):
        """Runs the job and keeps its curve."""
        curve = self.run(self.seed, self.budget, cache, **self.settings)
        path = self.path(cache)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(curve))
        partial.replace(path)


def do_jobs(jobs: Iterable[Job], cache: Cache, workers: int):
    """Runs the jobs that are not done yet. Finished jobs are kept if another one fails or the command is killed."""
    jobs = {job.path(cache): job for job in jobs}  # arms with the same settings are one job
    missing = [job for path, job in jobs.items() if not path.exists()]
    with tqdm(total=len(jobs), initial=len(jobs) - len(missing), unit="job") as progress:
        for _ in _done(missing, cache, workers):
            progress.update()


def _done(jobs: list[Job], cache: Cache, workers: int) -> Iterator[None]:
    if workers == 1:
        yield from (job.do(cache) for job in jobs)
        return
    # Workers read these variables when they start: each has one thread and shows no bars beside the command's.
    os.environ.update(OMP_NUM_THREADS="1", TQDM_DISABLE="1")
    # Workers are not forked, since torch's threads do not survive a fork.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(job.do, cache) for job in jobs]
        try:
            yield from (future.result() for future in as_completed(futures))
        finally:
            pool.shutdown(cancel_futures=True)
