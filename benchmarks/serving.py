"""Measure a server under load on this machine: throughput and latency, bad clients, and a killed replica.

    OMP_NUM_THREADS=2 python benchmarks/serving.py

1, 4 and 16 clients at once ask for images of the shapes checkpoint; each asks again when it has its image. One server
draws one image at a time, and another draws up to 16. Then, while good requests continue, there come a thousand bad
requests, clients that send half a request and stay connected, and clients that leave before their answer; the memory of
the replica is read before and after. Finally one of two replicas is killed under load. A request counts as lost if it
got neither its image nor a status.
Writes `results/serving.json`: `batching_speedup` (images a second at 16 clients, with batches divided by without),
`latencies`, `lost`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import aiohttp
from backbone import RESULTS

from transformers_nextflow.evaluation.results import write_result


MODEL = Path(__file__).parents[1] / "checkpoints" / "nextflow-shapes"
IMAGES, CHAT = "/v1/images/generations", "/v1/chat/completions"
CLIENTS = (1, 4, 16)
TARGET_SPEEDUP = 2.0
PART_OF_A_REQUEST = b"POST /v1/images/generations HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n{"
BAD = [
    (IMAGES, {}),
    (IMAGES, {"prompt": ""}),
    (IMAGES, {"prompt": "a red circle", "size": "65x64"}),
    (IMAGES, {"prompt": "a red circle", "n": 1000}),
    (IMAGES, {"prompt": "a red circle " * 2000}),
    (IMAGES, {"prompt": "a red circle", "seeds": [1]}),
    (CHAT, {"messages": []}),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "/etc/passwd"}}]}]}),
    (CHAT, {"messages": [{"role": "pirate", "content": "hi"}]}),
    ("/nothing", {}),
]


@contextlib.contextmanager
def server(*options: str) -> Iterator[str]:
    """Starts a server as the command does, and yields its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "transformers_nextflow.cli", "serve", str(MODEL), "--port", str(port), *options]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            asyncio.run(until_it_answers(f"http://127.0.0.1:{port}"))
            yield f"http://127.0.0.1:{port}"
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)


async def until_it_answers(address: str):
    async with aiohttp.ClientSession(address) as session:
        for _ in range(120):
            with contextlib.suppress(aiohttp.ClientError):
                async with session.get("/health") as response:
                    if response.status == 200:
                        return
            await asyncio.sleep(1)
    raise TimeoutError(f"{address} does not answer.")


async def draw(session: aiohttp.ClientSession, seed: int) -> tuple[int | None, float]:
    """Status and seconds of a request; no status where none came."""
    start = time.perf_counter()
    try:
        async with session.post(IMAGES, json={"prompt": "a red circle and a blue square", "seed": seed}) as response:
            await response.read()
            return response.status, time.perf_counter() - start
    except aiohttp.ClientError:
        return None, time.perf_counter() - start


async def load(address: str, clients: int, requests: int) -> tuple[list[tuple[int | None, float]], float]:
    """Answers of `requests` that `clients` send, each one after the other; and seconds in all."""
    seeds = iter(range(requests))

    async def client(session) -> list:
        return [await draw(session, seed) for seed in seeds]

    async with aiohttp.ClientSession(address, connector=aiohttp.TCPConnector(limit=0)) as session:
        start = time.perf_counter()
        answers = await asyncio.gather(*(client(session) for _ in range(clients)))
        return sum(answers, []), time.perf_counter() - start


def throughput(address: str, clients: int) -> dict:
    asyncio.run(load(address, clients, clients))  # a warm-up that is not measured
    answers, seconds = asyncio.run(load(address, clients, 16 + 4 * clients))
    assert all(status == 200 for status, _ in answers), Counter(status for status, _ in answers)
    latencies = sorted(latency for _, latency in answers)
    p95 = latencies[int(0.95 * (len(latencies) - 1))]
    return {"images_per_second": len(answers) / seconds, "p50": statistics.median(latencies), "p95": p95}


async def bad_clients(address: str, count: int) -> dict:
    """Bad requests, half-sent ones, and clients that leave, while good requests go on."""
    host, port = address.removeprefix("http://").split(":")
    held = [await asyncio.open_connection(host, int(port)) for _ in range(16)]
    for _, writer in held:
        writer.write(PART_OF_A_REQUEST)
    statuses: Counter = Counter()
    numbers = iter(range(count))

    async def bad(session):
        for number in numbers:
            path, body = BAD[number % len(BAD)]
            async with session.post(path, json=body) as response:
                statuses[response.status] += 1

    async def leaving(session):
        for _ in range(20):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(draw(session, 0), 0.02)

    async with aiohttp.ClientSession(address) as session:
        work = [*(bad(session) for _ in range(8)), leaving(session)]
        (good, _), *_ = await asyncio.gather(load(address, 4, 40), *work)
    for _, writer in held:
        writer.close()
    return {
        "bad_requests": count,
        "statuses": {str(status): number for status, number in sorted(statuses.items())},
        "good_requests_answered": sum(status == 200 for status, _ in good),
        "good_requests": len(good),
    }


def replicas() -> dict[int, float]:
    """Returns the memory in MiB of each replica's process."""
    lines = subprocess.run(["ps", "-eo", "pid,rss,args"], capture_output=True, text=True).stdout.splitlines()
    found = [line.split(None, 2) for line in lines if "ray::ServeReplica" in line]
    return {int(pid): int(kib) / 1024 for pid, kib, _ in found}


async def killed_replica(address: str) -> dict:
    """What becomes of requests when one of two replicas is killed, and whether there are two again."""
    before = replicas()
    running = asyncio.create_task(load(address, 16, 160))
    await asyncio.sleep(1.5)
    os.kill(next(iter(before)), signal.SIGKILL)
    answers, _ = await running
    statuses = Counter(status for status, _ in answers)
    for _ in range(60):
        if len(replicas()) == 2:
            break
        await asyncio.sleep(1)
    after, _ = await load(address, 8, 16)
    return {
        "requests": len(answers),
        "answered": statuses[200],
        "told_5xx": sum(number for status, number in statuses.items() if status and status >= 500),
        "lost": statuses[None],
        "replicas_again": len(replicas()),
        "answered_afterwards": sum(status == 200 for status, _ in after),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bad-requests", type=int, default=1000)
    arguments = parser.parse_args()
    latencies = {}
    with server("--max-batch-size", "1") as address:
        latencies["off"] = {str(clients): throughput(address, clients) for clients in CLIENTS}
    with server("--max-batch-size", "16") as address:
        latencies["on"] = {str(clients): throughput(address, clients) for clients in CLIENTS}
        asyncio.run(bad_clients(address, arguments.bad_requests))  # a first time, so that caches are filled
        (before,) = replicas().values()
        refused = asyncio.run(bad_clients(address, arguments.bad_requests))
        (after,) = replicas().values()
    with server("--replicas", "2", "--cpus", "1") as address:
        asyncio.run(load(address, 8, 16))
        killed = asyncio.run(killed_replica(address))
    speedup = latencies["on"]["16"]["images_per_second"] / latencies["off"]["16"]["images_per_second"]
    values = {
        "batching_speedup": speedup,
        "target_speedup": TARGET_SPEEDUP,
        "latencies": latencies,
        "lost": killed["lost"],
        "killed_replica": killed,
        "bad_clients": refused,
        "memory_mib": {"before": before, "after": after},
    }
    print(json.dumps(values, indent=2))
    write_result(RESULTS / "serving.json", values)


if __name__ == "__main__":
    main()
