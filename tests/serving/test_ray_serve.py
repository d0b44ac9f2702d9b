"""A real server, as its user starts it and as OpenAI's client talks to it."""

import base64
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import urlopen

import pytest


openai = pytest.importorskip("openai")
pytest.importorskip("ray.serve", reason="needs the extra serve")

from test_server_app import BUNDLED, png, seeded  # noqa: E402

from transformers_nextflow.serving.loading import load_pipeline  # noqa: E402


SECONDS = 120  # until it answers, on a machine that does other things too


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def wait_until_it_answers(process: subprocess.Popen, port: int, log: Path):
    for _ in range(SECONDS):
        assert process.poll() is None, log.read_text()
        try:
            with urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except OSError:
            time.sleep(1)
    pytest.fail(log.read_text())


def test_the_command_serves_openais_client_and_ends_on_ctrl_c(tmp_path):
    port, log = free_port(), tmp_path / "log"
    command = [
        sys.executable,
        "-m",
        "transformers_nextflow.cli",
        "serve",
        BUNDLED,
        "--port",
        str(port),
        "--name",
        "shapes",
    ]
    environment = os.environ | {"RAY_TMPDIR": "/tmp"}
    with open(log, "w") as file, subprocess.Popen(command, stdout=file, stderr=file, env=environment) as process:
        try:
            wait_until_it_answers(process, port, log)
            client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
            pipe = load_pipeline(BUNDLED, "cpu")
            own = png(pipe("a red circle", generator=seeded(3)).images[0])

            drawn = client.images.generate(model="shapes", prompt="a red circle", size="64x64", extra_body={"seed": 3})
            assert base64.b64decode(drawn.data[0].b64_json) == own
            streamed = list(
                client.images.generate(
                    model="shapes", prompt="a red circle", stream=True, partial_images=1, extra_body={"seed": 3}
                )
            )
            assert [event.type for event in streamed] == [
                "image_generation.partial_image",
                "image_generation.completed",
            ]
            assert base64.b64decode(streamed[1].b64_json) == own
            edited = client.images.edit(model="shapes", image=("a.png", own), prompt="make it blue")
            assert base64.b64decode(edited.data[0].b64_json)[:4] == b"\x89PNG"
            messages = [{"role": "user", "content": "draw a red circle."}]
            chunks = list(client.chat.completions.create(model="shapes", messages=messages, stream=True))
            assert chunks[-1].choices[0].finish_reason == "stop"
            with pytest.raises(openai.BadRequestError, match="nearest"):
                client.images.generate(model="shapes", prompt="a red circle", size="65x64")

            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 128 + signal.SIGINT
            assert "Traceback" not in log.read_text() and "Interrupted. The server has ended." in log.read_text()
        finally:
            process.kill()


def test_counts_that_cannot_be_are_refused_before_anything_starts():
    from transformers_nextflow.serving import ray_serve
    from transformers_nextflow.serving.settings import ServingSettings

    with pytest.raises(ValueError, match="max_replicas"):
        ray_serve.running(ServingSettings(BUNDLED), replicas=3, max_replicas=2).__enter__()
    assert not ray_serve.ray.is_initialized()
