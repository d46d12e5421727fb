"""Requests to a `DerisPipeline`: per second, latency, and memory over many of them.

A request is an image with K phrases. It is answered in three ways: its phrases one at a time, a request at a time, and
requests in batches of `evaluation.images_per_device`. All three must give the same scores. Latency is wall time from a
request's start to its answers, in a batch that of the batch; nothing else should run on the machine. Default checkpoint: the
quickstart's, at a tiny size.

`--demo` also asks the endpoint `/segment` of a `deris-llm demo` over HTTP, from one client and from eight at a time, and
watches that server's memory. It needs the extra `demo`.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _bench import bench_console, device_name, machine
from PIL import Image
from rich.table import Column, Table

from deris_llm.common.messages import quiet_libraries
from deris_llm.serving.answers import ImageAnswer
from deris_llm.serving.pipeline import DerisPipeline

CHECKPOINT = Path("builtin:tiny")
PHRASES = (
    "the red circle", "the blue square on the left", "a small green star", "the triangle behind the circle",
    "the second from the left", "the large one", "the yellow thing near the bottom",
)  # fmt: skip
WIDTH, HEIGHT = 640, 480
NUM_CLIENTS = 8
TOLERANCE = 1e-3  # of scores in [0, 1]; float32 in batches of other sizes rounds differently

Request = tuple[Image.Image, Sequence[str]]


@dataclass(frozen=True)
class Timing:
    """One way of answering requests."""

    name: str
    num_phrases: int  # of a request
    latencies: list[float]  # seconds
    seconds: float  # for all of them


def requests_of(number: int, num_phrases: int) -> list[Request]:
    """Returns images of coloured rectangles with phrases."""
    generator = np.random.default_rng(0)
    requests = []
    for n in range(number):
        pixels = np.full((HEIGHT, WIDTH, 3), generator.integers(40, 220, 3), dtype=np.uint8)
        for _ in range(6):
            y, x = generator.integers(0, (HEIGHT - 120, WIDTH - 120))
            pixels[y : y + 120, x : x + 120] = generator.integers(0, 255, 3)
        asked = tuple(itertools.islice(itertools.cycle(PHRASES), n, n + num_phrases))
        requests.append((Image.fromarray(pixels), asked))
    return requests


def phrases_one_at_a_time(pipeline: DerisPipeline, batch: Sequence[Request]) -> list[list[ImageAnswer]]:
    """Asks every phrase on its own."""
    return [[answer for phrase in phrases for answer in pipeline(image, [phrase])] for image, phrases in batch]


def together(pipeline: DerisPipeline, batch: Sequence[Request]) -> list[list[ImageAnswer]]:
    """Asks all phrases of all images in one batch."""
    return list(pipeline.answer_all(batch))


def measured(
    name: str,
    answer: Callable[[DerisPipeline, Sequence[Request]], list[list[ImageAnswer]]],
    pipeline: DerisPipeline,
    requests: Sequence[Request],
    size: int,
) -> tuple[Timing, list[float]]:
    """Answers all requests, ``size`` at a time; returns the times and the scores in order."""
    answer(pipeline, requests[:size])  # the first call sets things up
    latencies: list[float] = []
    scores: list[float] = []
    started = time.perf_counter()
    for start in range(0, len(requests), size):
        batch = requests[start : start + size]
        begun = time.perf_counter()
        answers = answer(pipeline, batch)  # masks on the CPU: a GPU has finished
        latencies += [time.perf_counter() - begun] * len(batch)
        scores += [found.score for of_request in answers for found in of_request]
    return Timing(name, len(requests[0][1]), latencies, time.perf_counter() - started), scores


def bench(pipeline: DerisPipeline, numbers: Sequence[int], num_requests: int) -> list[Timing]:
    """Returns the rows for each number of phrases.

    Raises:
        AssertionError: the ways give different scores.
    """
    size, rows = pipeline.config.evaluation.images_per_device, []
    for num_phrases in numbers:
        requests = requests_of(num_requests, num_phrases)
        ways = [("a request at a time", together, 1), (f"{size} requests at a time", together, size)]
        if num_phrases > 1:
            ways.insert(0, ("a phrase at a time", phrases_one_at_a_time, 1))
        found = [measured(name, answer, pipeline, requests, at_a_time) for name, answer, at_a_time in ways]
        for timing, scores in found:
            difference = float(np.abs(np.subtract(scores, found[0][1])).max())
            assert difference <= TOLERANCE, f"{timing.name}: scores differ by {difference:.1e}"
            rows.append(timing)
    return rows


def memory_growth(pipeline: DerisPipeline, num_requests: int) -> tuple[float, float]:
    """Returns MiB of this process after a tenth of the requests, and how much the rest adds."""
    requests = requests_of(10, max(1, len(PHRASES)))
    after_a_tenth = 0.0
    for number in range(num_requests):
        together(pipeline, [requests[number % len(requests)]])
        if number == num_requests // 10:
            after_a_tenth = _resident_mib()
    return after_a_tenth, _resident_mib() - after_a_tenth


def _resident_mib(pid: int | str = "self") -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@contextlib.contextmanager
def demo_server(checkpoint: Path) -> Iterator[tuple[str, int]]:
    """Runs `deris-llm demo`; gives its address and process id."""
    command = [sys.executable, "-m", "deris_llm.cli", "demo", "--checkpoint", str(checkpoint)]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        try:
            first = process.stdout.readline()
            assert first.startswith("demo: "), f"{' '.join(command)}: expected its address, got {first!r}"
            yield first.removeprefix("demo: ").strip(), process.pid
        finally:
            process.terminate()


def bench_demo(
    url: str, pid: int, numbers: Sequence[int], num_requests: int, memory_requests: int
) -> tuple[list[Timing], float, float]:
    """Asks the endpoint: a row for each number of phrases and of clients; then the server's MiB and how much they grow."""
    from gradio_client import Client, handle_file

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(NUM_CLIENTS) as threads:
        clients = list(threads.map(lambda _: Client(url, verbose=False), range(NUM_CLIENTS)))

        def ask(client: Any, file: Path, phrases: Sequence[str]) -> float:
            begun = time.perf_counter()
            answers = client.predict(handle_file(str(file)), list(phrases), None, None, None, api_name="/segment")
            assert len(answers) == len(phrases), f"/segment: expected {len(phrases)} answers, got {answers}"
            return time.perf_counter() - begun

        def ask_all(requests: Sequence[tuple[Path, Sequence[str]]], num_clients: int) -> list[float]:
            shares = [requests[i::num_clients] for i in range(num_clients)]
            served = threads.map(
                lambda pair: [ask(pair[0], *one) for one in pair[1]], zip(clients, shares, strict=False)
            )
            return [seconds for of_client in served for seconds in of_client]

        rows = []
        for num_phrases in numbers:
            requests = []
            for number, (image, phrases) in enumerate(requests_of(num_requests, num_phrases)):
                file = Path(folder, f"{num_phrases}-{number}.png")
                image.save(file)
                requests.append((file, phrases))
            ask_all(requests[:1], 1)  # the first call sets things up
            for num_clients in (1, NUM_CLIENTS):
                started = time.perf_counter()
                latencies = ask_all(requests, num_clients)
                rows.append(
                    Timing(f"/segment, {num_clients} at a time", num_phrases, latencies, time.perf_counter() - started)
                )
        after_a_tenth = 0.0
        for number in range(memory_requests):
            ask(clients[0], *requests[number % len(requests)])
            if number == memory_requests // 10:
                after_a_tenth = _resident_mib(pid)
        return rows, after_a_tenth, _resident_mib(pid) - after_a_tenth


def timing_table(rows: Sequence[Timing], title: str = "DerisPipeline") -> Table:
    """The rows with requests and phrases per second, median and 95th percentile of the latency."""
    names = ("phrases", "requests/s", "phrases/s", "p50 ms", "p95 ms")
    table = Table("answered", *[Column(name, justify="right") for name in names], title=title)
    for row in rows:
        per_second = len(row.latencies) / row.seconds
        p50, p95 = (f"{1e3 * value:.0f}" for value in np.percentile(row.latencies, (50, 95)))
        table.add_row(
            row.name, str(row.num_phrases), f"{per_second:.2f}", f"{per_second * row.num_phrases:.2f}", p50, p95
        )
    return table


def main() -> None:
    """Parses, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, metavar="DIR", help="default: the quickstart's")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")
    parser.add_argument("--phrases", type=int, nargs="+", default=[1, 7], metavar="K", help="(default 1 7)")
    parser.add_argument("--requests", type=int, default=64, metavar="N", help="timed of each row (default 64)")
    parser.add_argument("--memory-requests", type=int, default=1000, metavar="N", help="(default 1000)")
    parser.add_argument("--demo", action="store_true", help="the endpoint of the demo as well")
    parser.add_argument("--quick", action="store_true", help="few requests")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.requests, arguments.phrases, arguments.memory_requests = 3, [1, 2], 4
    quiet_libraries()
    torch.set_num_threads(1)
    console = bench_console()
    pipeline = DerisPipeline.from_pretrained(arguments.checkpoint, arguments.device)
    console.print(f"{machine('torch', 'transformers')}; {device_name(torch.device(pipeline.device))}")
    console.print(timing_table(bench(pipeline, arguments.phrases, arguments.requests)))
    if arguments.memory_requests:
        resident, growth = memory_growth(pipeline, arguments.memory_requests)
        console.print(f"memory: {resident:,.0f} MiB, {growth:+.1f} MiB over {arguments.memory_requests:,} requests")
    if arguments.demo:
        with demo_server(arguments.checkpoint) as (url, pid):
            rows, resident, growth = bench_demo(
                url, pid, arguments.phrases, arguments.requests, arguments.memory_requests
            )
        console.print(timing_table(rows, "deris-llm demo over HTTP"))
        console.print(f"memory: {resident:,.0f} MiB, {growth:+.1f} MiB over {arguments.memory_requests:,} requests")


if __name__ == "__main__":
    main()
