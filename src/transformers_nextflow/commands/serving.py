"""The command that serves a model."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from ..utils.one_line_errors import errors_in_one_line, note_on_interrupt
from .options import Device, Dtype


def serve(
    model: Annotated[str, typer.Argument(help="Folder of a model or a pipeline, or a repository of the Hub.")],
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 for all of this machine's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    name: Annotated[str, typer.Option(help="Name of the model in requests; default: the folder's.")] = "",
    replicas: Annotated[int, typer.Option(min=1, help="Copies of the model.")] = 1,
    max_replicas: Annotated[int | None, typer.Option(help="Largest number while requests wait.")] = None,
    cpus: Annotated[float | None, typer.Option(help="Cores of a replica; default: an equal share.")] = None,
    gpus: Annotated[float | None, typer.Option(help="GPUs of a replica; default: 1 on a GPU; 0.5 shares one.")] = None,
    max_batch_size: Annotated[int, typer.Option(min=1, help="The largest number of images in a batch.")] = 16,
    batch_wait: Annotated[float, typer.Option(min=0, help="Seconds that an idle replica waits for more.")] = 0.05,
    max_waiting: Annotated[int, typer.Option(min=1, help="Largest number of requests that a replica accepts.")] = 64,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds that a request may take.")] = 300.0,
    max_upload: Annotated[int, typer.Option(min=1, help="The largest request in bytes.")] = 32 * 2**20,
    metrics_port: Annotated[int | None, typer.Option(help="Port of Prometheus' metrics; default: any.")] = None,
    device: Device = None,
    dtype: Dtype = "auto",
):
    """Serve a model over HTTP with OpenAI's API; see docs/serving.md."""
    with errors_in_one_line(), note_on_interrupt(lambda: "The server has ended."):
        from ..serving import ray_serve
        from ..serving.loading import check_loadable
        from ..serving.settings import ServingSettings

        settings = ServingSettings(
            model, name, device, dtype, max_batch_size, batch_wait, max_waiting, timeout, max_upload
        )
        check_loadable(model, device, dtype)  # so that its errors are not only in a replica's log
        with ray_serve.running(settings, host, port, replicas, max_replicas, cpus, gpus, metrics_port):
            typer.echo(f"{settings.name} answers at http://{host}:{port}/v1; Ctrl-C ends it.")
            while True:
                time.sleep(1)
