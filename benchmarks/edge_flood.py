"""Ten thousand connections that ask `pocketvlm serve` at the same moment: what each is answered, and what is left.

    python -m benchmarks.edge_flood BUNDLE

The server is a process on the loopback interface with its defaults and one thread for the model; every connection is
open before any request is sent. Needs `ulimit -n` above the number of connections. Result:
benchmarks/results/edge_flood.json.
"""

from __future__ import annotations

import asyncio
import io
import json
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import tyro
from PIL import Image
from tyro.conf import Positional

from benchmarks.results_folder import RESULTS, machine, write

RESULT = "edge_flood.json"


async def flood(port: int, connections: int) -> dict[str, Any]:
    """One picture over each connection, all at once; status, or the name of the error, and how often."""
    file = io.BytesIO()
    Image.effect_noise((224, 224), 60).convert("RGB").save(file, "JPEG")
    body = file.getvalue()
    head = f"POST /embed/image HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    go, seen = asyncio.Event(), Counter[str]()

    async def one() -> None:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            await go.wait()
            writer.write(head + body)
            line = await asyncio.wait_for(reader.readline(), 120)
            seen[line.split()[1].decode() if line else "closed"] += 1
            writer.close()
        except (OSError, TimeoutError) as error:
            seen[type(error).__name__] += 1

    tasks = []
    for number in range(connections):
        tasks.append(asyncio.create_task(one()))
        if number % 200 == 0:
            await asyncio.sleep(0.05)
    await asyncio.sleep(3)
    started = time.perf_counter()
    go.set()
    await asyncio.gather(*tasks)
    return {"answers": dict(sorted(seen.items())), "seconds": round(time.perf_counter() - started, 1)}


def main(
    bundle: Annotated[Positional[Path], tyro.conf.arg(metavar="BUNDLE")],
    precision: str = "int8",
    connections: int = 10_000,
) -> None:
    """Flood a fresh server and write what came back."""
    command = [sys.executable, "-m", "pocketvlm", "serve", str(bundle), "--backend", "onnxruntime"]
    options = ["--precision", precision, "--threads", "1", "--port", "0"]
    process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        told = re.search(r":(\d+) \(", process.stdout.readline())
        assert told is not None
        port = int(told[1])
        facts = machine()
        found = asyncio.run(flood(port, connections))
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health") as answer:
            health = json.loads(answer.read())
        memory = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())
    finally:
        process.send_signal(signal.SIGINT)
        errors = process.communicate(timeout=60)[1]
    write(
        RESULT,
        {
            "machine": facts,
            "connections": connections,
            "model": f"{health['model']} {health['backend']} {health['precision']}",
            **found,
            "after": {key: health[key] for key in ("status", "inside", "refused")},
            "peak_mib": round(int(memory[1]) / 1024) if memory else None,
            "tracebacks": errors.count("Traceback"),
        },
    )
    print(RESULTS / RESULT)


if __name__ == "__main__":
    tyro.cli(main)
