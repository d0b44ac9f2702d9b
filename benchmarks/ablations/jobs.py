"""Jobs of an ablation, an arm with a seed each: run by several processes, kept on disk, and made once.

Jobs know their settings, not the code: after a change of the code, take another folder or delete the old one.
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
    """What a job may spend: training steps, and prompts of each of the six categories that are scored."""

    steps: int
    prompts: int

    def __post_init__(self):
        if min(self.steps, self.prompts) < 1:
            raise ValueError(f"steps and prompts start at 1, got {self.steps} and {self.prompts}.")


@dataclass(frozen=True)
class Cache:
    """What several jobs use, or a later run of the command; kept under the settings that it was made with."""

    root: Path

    def path(self, kind: str, settings: dict) -> Path:
        key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        return self.root / kind / key

    def folder(self, kind: str, settings: dict, make: Callable[[Path], None]) -> Path:
        """The folder that `make` writes, whole or not at all; processes that want the same wait for the first one."""
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
    """`run(seed, budget, cache, **settings)` returns the job's curve: points with `step` and scores by name."""

    run: Callable[..., list[Point]]
    settings: dict
    seed: int
    budget: Budget

    def path(self, cache: Cache) -> Path:
        # Not by the module's name: a script's own is __main__.
        run = f"{Path(self.run.__code__.co_filename).stem}.{self.run.__qualname__}"
        key = {"run": run, "settings": self.settings, "seed": self.seed, "budget": asdict(self.budget)}
        return cache.path("jobs", key).with_suffix(".json")

    def curve(self, cache: Cache) -> list[Point] | None:
        """The curve that is kept on disk; `None` before the job is done."""
        path = self.path(cache)
        return json.loads(path.read_text()) if path.exists() else None

    def do(self, cache: Cache):
        """Run, and keep the curve."""
        curve = self.run(self.seed, self.budget, cache, **self.settings)
        path = self.path(cache)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(curve))
        partial.replace(path)


def do_jobs(jobs: Iterable[Job], cache: Cache, workers: int):
    """Do the jobs that are not done yet; what is done stays if another one fails or the command is killed."""
    jobs = {job.path(cache): job for job in jobs}  # arms of the same settings are one job
    missing = [job for path, job in jobs.items() if not path.exists()]
    with tqdm(total=len(jobs), initial=len(jobs) - len(missing), unit="job") as progress:
        for _ in _done(missing, cache, workers):
            progress.update()


def _done(jobs: list[Job], cache: Cache, workers: int) -> Iterator[None]:
    if workers == 1:
        yield from (job.do(cache) for job in jobs)
        return
    # Workers read these when they start: one thread each, and no bars of their own beside the command's.
    os.environ.update(OMP_NUM_THREADS="1", TQDM_DISABLE="1")
    # Not forked: threads of torch do not survive it.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(job.do, cache) for job in jobs]
        try:
            yield from (future.result() for future in as_completed(futures))
        finally:
            pool.shutdown(cancel_futures=True)
