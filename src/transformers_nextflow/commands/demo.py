"""The command that opens a model in the browser."""

from __future__ import annotations

from typing import Annotated

import typer

from ..utils.addresses import check_can_listen
from ..utils.one_line_errors import errors_in_one_line
from .options import BUNDLED_EDITING, Device, Dtype, model_settings


def demo(
    model: Annotated[str, typer.Argument(**model_settings(BUNDLED_EDITING))],
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 for all of this machine's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 7860,
    open_browser: Annotated[bool, typer.Option("--open/--no-open", help="Open a browser.")] = False,
    device: Device = None,
    dtype: Dtype = "auto",
):
    """Draw, edit, vary and chat in the browser; see docs/demo.md."""
    with errors_in_one_line():
        check_can_listen(host, port)  # before imports and loading, which take seconds
        from ..demo.page import launch
        from ..serving.loading import load_pipeline

        launch(load_pipeline(model, device, dtype), server_name=host, server_port=port, inbrowser=open_browser)
