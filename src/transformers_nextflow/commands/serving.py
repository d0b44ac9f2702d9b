"""The command that serves a model."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from ..utils.one_line_errors import errors_in_one_line, tells_what_is_kept
from .options import Device, Dtype


def serve(
    model: Annotated[str, typer.Argument(help="Folder of a model or a pipeline, or a repository of the Hub.")],
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 for all of this machine's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    name: Annotated[str, typer.Option(help="By which requests name the model; default: the folder's.")] = "",
    replicas: Annotated[int, typer.Option(min=1, help="Copies of the model.")] = 1,
    max_replicas: Annotated[int | None, typer.Option(help="Up to how many, while requests wait.")] = None,
    cpus: Annotated[float | None, typer.Option(help="Of a replica; default: this machine's, shared out.")] = None,
    gpus: Annotated[float | None, typer.Option(help="Of a replica, as 0.5; default: one where the device is.")] = None,
    max_batch_size: Annotated[int, typer.Option(min=1, help="Images that are drawn in one batch.")] = 16,
    batch_wait: Annotated[float, typer.Option(min=0, help="Seconds that an idle replica waits for more.")] = 0.05,
    max_waiting: Annotated[int, typer.Option(min=1, help="Requests at most that a replica accepts at once.")] = 64,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds that a request may take.")] = 300.0,
    max_upload: Annotated[int, typer.Option(min=1, help="Bytes of a request at most.")] = 32 * 2**20,
    metrics_port: Annotated[int | None, typer.Option(help="Of Prometheus' metrics; default: Ray chooses.")] = None,
    device: Device = None,
    dtype: Dtype = "auto",
):
    """Serve a model by HTTP, as clients of OpenAI's API know it; see docs/serving.md."""
    with errors_in_one_line(), tells_what_is_kept(lambda: "The server has ended."):
        from ..serving import ray_serve
        from ..serving.loading import load_pipeline
        from ..serving.settings import ServingSettings

        settings = ServingSettings(
            model, name, device, dtype, max_batch_size, batch_wait, max_waiting, timeout, max_upload
        )
        load_pipeline(model, device, dtype)  # errors about the folder are shown here, not only in a replica's log
        with ray_serve.running(settings, host, port, replicas, max_replicas, cpus, gpus, metrics_port):
            typer.echo(f"{settings.name} answers at http://{host}:{port}/v1; Ctrl-C ends it.")
            while True:
                time.sleep(1)
