"""Replicas on Ray Serve around the application of `app`: batching, metrics and scaling."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..utils.addresses import check_can_listen
from ..utils.interrupts import end_on_termination
from .settings import ServingSettings


try:
    # Ray's usage statistics are off, unless the user switches them on.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Seconds, three times over, after which Serve ends a listener that is still starting, and with it the start: 5 are
    # too few for a busy machine. Serve itself gives up after 60.
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
    import fastapi  # noqa: F401
    import ray
    from ray import serve
    from ray.serve.metrics import Counter, Gauge, Histogram
except ImportError as error:
    raise ImportError("Serving needs Ray Serve: pip install transformers-nextflow[serve].") from error

if TYPE_CHECKING:
    from fastapi import FastAPI

APPLICATION = "nextflow"
# How many more requests a replica receives than it admits: those to answer with 429, and health checks.
MAX_REFUSED_AT_ONCE = 256
SECONDS = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100]


@contextmanager
def running(
    settings: ServingSettings,
    host: str = "127.0.0.1",
    port: int = 8000,
    replicas: int = 1,
    max_replicas: int | None = None,
    cpus: float | None = None,
    gpus: float | None = None,
    metrics_port: int | None = None,
) -> Iterator[None]:
    """Serves a model during the block, on the Ray cluster of `RAY_ADDRESS` or on a new one on this machine.

    Args:
        settings: settings of each replica.
        host, port: the address at which requests are received.
        replicas, max_replicas: the number of replicas at first, and the largest number while requests wait; default: no
            more than `replicas`.
        cpus, gpus: cores and GPUs of each replica. Default: a GPU if the device is one, and a share of this machine's
            cores.
        metrics_port: port of Prometheus' metrics at `/metrics`; default: one that Ray chooses.

    Raises:
        ValueError: for counts out of range, an address where nothing can listen, and for more than this machine has.
    """
    most = replicas if max_replicas is None else max_replicas
    if replicas < 1 or most < replicas:
        raise ValueError(f"There is at least 1 replica, and at most max_replicas, got {replicas} and {most}.")
    if metrics_port is not None and not 1 <= metrics_port <= 65535:
        raise ValueError(f"metrics_port must be from 1 to 65535, got {metrics_port}.")
    for name, value in (("cpus", cpus), ("gpus", gpus)):
        if value is not None and not (0 <= value < math.inf and (value <= 1 or value == int(value))):
            raise ValueError(f"{name} of a replica must be a share from 0 to 1, or a whole number, got {value}.")
    is_own = not os.environ.get("RAY_ADDRESS")
    if is_own:  # else the addresses are those of another machine
        check_can_listen(host, port)
    gpus = float(_wants_gpu(settings)) if gpus is None else gpus
    cpus = 1.0 if gpus else max(1.0, (os.cpu_count() or 1) // most) if cpus is None else cpus
    try:
        if not ray.is_initialized():
            ray.init(
                _metrics_export_port=metrics_port, include_dashboard=False, log_to_driver=bool(os.environ.get("DEBUG"))
            )
        if is_own:  # a cluster may grow
            _check_resources(replicas, cpus, gpus)
        end_on_termination()  # in order, on SIGTERM too, which Ray has taken
        serve.start(http_options={"host": host, "port": port, "request_timeout_s": 2 * settings.timeout})
        serve.run(deployment(settings, replicas, most, cpus, gpus), name=APPLICATION, route_prefix="/")
        yield
    finally:
        serve.shutdown()
        ray.shutdown()


def _check_resources(replicas: int, cpus: float, gpus: float):
    """Raises `ValueError` for more than Ray has, for which replicas would wait."""
    has = ray.cluster_resources()
    for name, wanted in (("CPU", replicas * cpus), ("GPU", replicas * gpus)):
        if wanted > has.get(name, 0):
            raise ValueError(
                f"{replicas} replicas want {wanted:g} {name}s, and this machine has {has.get(name, 0):g}; give fewer "
                f"replicas, or a smaller share as --{name.lower()}s 0.5."
            )


def deployment(settings: ServingSettings, replicas: int, max_replicas: int, cpus: float, gpus: float) -> Any:
    """The application for `serve.run`, which a Serve config file may name too."""
    scaling = {"num_replicas": replicas}
    if max_replicas > replicas:
        target = 2 * settings.max_batch_size  # the current batch and the next one
        bounds = {"min_replicas": replicas, "max_replicas": max_replicas, "target_ongoing_requests": target}
        scaling = {"autoscaling_config": bounds}

    def build() -> FastAPI:  # runs in the replica
        return _replica(settings)

    options = {"num_cpus": cpus, "num_gpus": gpus}
    return serve.deployment(
        serve.ingress(build)(),
        name="model",
        ray_actor_options=options,
        max_ongoing_requests=settings.max_waiting + MAX_REFUSED_AT_ONCE,
        health_check_period_s=5,
        **scaling,
    ).bind()


def _replica(settings: ServingSettings) -> FastAPI:
    from .app import PATHS, create_app
    from .jobs import Job
    from .loading import load_pipeline
    from .worker import Worker

    pipeline = load_pipeline(settings.model, settings.device, settings.dtype)
    worker = Worker(pipeline, settings)

    @serve.batch(
        max_batch_size=settings.max_batch_size,
        batch_wait_timeout_s=settings.batch_wait,
        batch_size_fn=lambda jobs: sum(job.num_images for job in jobs),
    )
    async def run(jobs: list[Job]) -> list[None]:
        return await worker.run(jobs)

    worker.schedule = run
    answers = Counter("nextflow_answers", "Requests that were answered.", tag_keys=("path", "status"))
    images = Counter("nextflow_images", "Images and answers of chats that were made.")
    seconds = Histogram("nextflow_batch_seconds", "Seconds of a batch.", boundaries=SECONDS)
    waiting = Gauge("nextflow_waiting", "Requests that were accepted and not yet answered.")

    def after_batch(count: int, duration: float):
        images.inc(count)
        seconds.observe(duration)
        waiting.set(worker.waiting)

    worker.after_batch = after_batch
    # Clients may request any path: all unknown paths count as one.
    return create_app(
        worker,
        lambda path, status: answers.inc(tags={"path": path if path in PATHS else "other", "status": str(status)}),
    )


def _wants_gpu(settings: ServingSettings) -> bool:
    import torch

    return torch.cuda.is_available() if settings.device is None else settings.device.startswith("cuda")
