"""`pocketvlm serve` as a process on the loopback interface: what it answers, what it refuses, and how it stops."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode

import numpy as np
import pytest
from PIL import Image

from pocketvlm.edge.errors import MissingExtraError, UsageError
from pocketvlm.edge.model import EdgeModel
from pocketvlm.edge.openapi import describe
from pocketvlm.edge.serve import Limits, make_app, serve


class Server(NamedTuple):
    process: subprocess.Popen[str]
    port: int

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            data = answer.read()
        finally:
            connection.close()
        return answer.status, json.loads(data) if "json" in answer.headers["content-type"] else data.decode()


def start(bundle: Path, *options: str) -> Server:
    command = [sys.executable, "-m", "pocketvlm", "serve", str(bundle), "--port", "0", "--threads", "1", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.search(r"http://127\.0\.0\.1:(\d+) ", line)
    if found is None:
        process.kill()
        raise AssertionError(line + process.communicate()[1])
    return Server(process, int(found[1]))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # `tools` of conftest is a function's fixture, and one server is enough for all tests
    import importlib.util

    spec = importlib.util.spec_from_file_location("edge_toys", Path(__file__).with_name("conftest.py"))
    assert spec
    assert spec.loader
    toys = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(toys)
    return toys.write_bundle(tmp_path_factory.mktemp("served") / "bundle")


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[Server]:
    running = start(bundle, "--queue", "8")
    yield running
    running.process.terminate()
    running.process.communicate(timeout=20)


def png(colour: tuple[int, int, int]) -> bytes:
    file = BytesIO()
    Image.new("RGB", (20, 12), colour).save(file, "PNG")
    return file.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A small PNG that says it is large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b"")


def classify_path(*labels: str, template: str = "{}") -> str:
    return "/classify?" + urlencode([("template", template), *(("label", label) for label in labels)])


def test_it_answers_what_the_model_gives(server: Server, bundle: Path) -> None:
    model = EdgeModel.load(bundle, threads=1)
    status, health = server.ask("GET", "/health")
    assert (status, health["status"], health["space_id"], health["dim"]) == (200, "ok", "tiny-0", 4)
    status, found = server.ask("POST", "/embed/image", png((250, 10, 10)))
    assert status == 200
    np.testing.assert_allclose(found["embeddings"], model.embed_image(png((250, 10, 10))), atol=1e-6)
    status, found = server.ask("POST", "/embed/text", json.dumps({"texts": ["red", "a blue"]}))
    assert (status, found["space_id"], found["dim"]) == (200, "tiny-0", 4)
    np.testing.assert_allclose(found["embeddings"], model.embed_text(["red", "a blue"]), atol=1e-6)
    status, found = server.ask("POST", classify_path("red", "blue", template="picture of {}"), png((0, 0, 200)))
    (expected,) = model.classify(png((0, 0, 200)), ["red", "blue"], "picture of {}")
    assert (status, found["label"]) == (200, "blue")
    assert found["probability"] == pytest.approx(expected.probability)
    assert list(found["scores"]) == ["blue", "red"]


def test_the_description_names_every_path_and_limit(server: Server) -> None:
    status, api = server.ask("GET", "/openapi.json")
    assert status == 200
    assert api["openapi"].startswith("3.1")
    assert set(api["paths"]) == {"/health", "/openapi.json", "/embed/image", "/embed/text", "/classify"}
    for path, operations in api["paths"].items():
        for method in operations:
            status, _ = server.ask(method.upper(), path, b"" if method == "post" else None)
            assert status in {int(code) for code in operations[method]["responses"]}
    texts = api["paths"]["/embed/text"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert texts["properties"]["texts"]["maxItems"] == Limits().texts


def test_it_does_not_offer_what_the_model_lacks(bundle: Path) -> None:
    model = EdgeModel.load(bundle, threads=1)
    model.tokenizer = None
    assert "/embed/text" not in {route.path for route in make_app(model).routes}
    import dataclasses

    labels = ("a", "b", "c", "d")
    contract = dataclasses.replace(model.contract, kind="classifier", text=None, labels=labels)
    paths = describe(contract, Limits())["paths"]
    assert "/embed/text" not in paths
    assert "parameters" not in paths["/classify"]["post"]


JPEG = b"\xff\xd8\xff\xe0 and no more"


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        ("/embed/image", b"plain words", 400, "not a picture"),
        ("/embed/image", JPEG, 400, "truncated"),
        ("/embed/image", b"", 400, "empty"),
        ("/embed/image", bomb(10_000, 9_000), 413, "10000 x 9000 pixels"),
        ("/embed/image", bomb(60_000, 60_000), 413, "safety limit"),
        ("/embed/image", bytes(17 << 20), 413, "body is larger"),
        ("/embed/text", json.dumps({"texts": ["x" * 1_000_000]}).encode(), 413, "body is larger"),
        ("/embed/text", json.dumps({"texts": ["x" * 20_000]}).encode(), 413, "longer than 10000"),
        ("/embed/text", json.dumps({"texts": ["a"] * 65}).encode(), 413, "1 to 64 are taken"),
        ("/embed/text", json.dumps({"texts": []}).encode(), 400, "1 to 64 are taken"),
        ("/embed/text", json.dumps({"texts": "red"}).encode(), 400, "no list of strings"),
        ("/embed/text", json.dumps({"texts": [1]}).encode(), 400, "no list of strings"),
        ("/embed/text", json.dumps({"texts": [" "]}).encode(), 400, "nothing to encode"),
        ("/embed/text", b'{"texts": ["\\ud800"]}', 400, "unpaired surrogate"),
        ("/embed/text", b"\xff\xfe{}", 400, "no JSON object"),
        ("/embed/text", b"[" * 100_000, 400, "no JSON object"),
        ("/classify", png((1, 2, 3)), 400, "no label was given"),
        ("/classify?label=red&label=red", png((1, 2, 3)), 400, "more than once"),
        ("/classify?label=red&template=x", png((1, 2, 3)), 400, "where the label goes"),
        ("/classify?" + "label=a&" * 1100, png((1, 2, 3)), 413, "1,100 labels"),
        ("/../../etc/passwd", b"", 404, "Not Found"),
        ("/embed/%2e%2e/%2e%2e/etc/passwd", b"", 404, "Not Found"),
    ],
)
def test_what_cannot_be_used_is_answered_in_a_sentence(
    server: Server, path: str, body: bytes, status: int, says: str
) -> None:
    found, answer = server.ask("POST", path, body)
    text = answer if isinstance(answer, str) else answer["error"]
    assert (found, says in text) == (status, True), text
    assert "\n" not in text
    assert "Traceback" not in text
    assert server.ask("GET", "/health")[0] == 200


def test_a_long_body_is_not_read_to_its_end(server: Server) -> None:
    """Without a length, as a chunked body that never ends."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(b"POST /embed/text HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
        sent = 0
        block = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
        try:
            while sent < 64 << 20:
                connection.sendall(block)
                sent += len(block)
        except OSError:
            pass
        try:
            answer = connection.recv(100)
        except OSError:
            answer = b""
    assert sent < 8 << 20
    assert not answer or answer.startswith(b"HTTP/1.1 413")
    assert server.ask("GET", "/health")[1]["inside"] == 0


def test_a_web_page_under_a_name_of_its_own_gets_nothing(server: Server) -> None:
    assert server.ask("GET", "/health", Host="evil.example")[0] == 400
    assert server.ask("GET", "/health", Host=f"localhost:{server.port}")[0] == 200
    assert "access-control-allow-origin" not in str(server.ask("GET", "/health", Origin="http://evil.example"))


async def _many(port: int, requests: int, connections: int) -> Counter[int]:
    """`requests` of them over so many connections, each waiting for its answer before it asks again."""
    body = png((9, 200, 9))
    head = f"POST /embed/image HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    left, seen = requests, Counter[int]()

    async def client() -> None:
        nonlocal left
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while left > 0:
            left -= 1
            writer.write(head + body)
            lines = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            length = re.search(r"content-length: (\d+)", lines)
            assert length
            await reader.readexactly(int(length[1]))
            seen[int(lines.split()[1])] += 1
            if lines.split()[1] == "429":
                assert "retry-after: 1" in lines
        writer.close()

    await asyncio.wait_for(asyncio.gather(*(client() for _ in range(connections))), 60)
    return seen


def test_more_than_may_wait_are_told_to_come_again(server: Server) -> None:
    seen = asyncio.run(_many(server.port, requests=1500, connections=150))
    assert set(seen) == {200, 429}
    assert sum(seen.values()) == 1500
    assert seen[429] > 100
    status, health = server.ask("GET", "/health")
    assert (status, health["inside"]) == (200, 0)
    assert health["refused"] >= seen[429]
    assert server.ask("POST", "/embed/image", png((1, 2, 3)))[0] == 200


def test_a_client_that_sends_nothing_is_let_go(bundle: Path) -> None:
    from contextlib import suppress

    limits = Limits(workers=1, queue=0, body_s=0.2)
    app = make_app(EdgeModel.load(bundle, threads=1), limits)
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(30)
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "http", "method": "POST", "path": "/embed/image", "raw_path": b"/embed/image", "query_string": b"",
        "headers": [(b"host", b"localhost")], "http_version": "1.1", "scheme": "http", "root_path": "",
        "server": ("localhost", 80), "client": ("localhost", 1),
    }  # fmt: skip
    with suppress(TimeoutError):
        asyncio.run(asyncio.wait_for(app(scope, receive, send), 5))
    assert sent[0]["status"] == 408


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_it_stops_cleanly(bundle: Path, name: str) -> None:
    running = start(bundle)
    assert running.ask("GET", "/health")[0] == 200
    os.kill(running.process.pid, getattr(signal, name))
    _, errors = running.process.communicate(timeout=20)
    assert "Traceback" not in errors
    assert running.process.returncode in (0, 130, -signal.SIGTERM, -signal.SIGINT)
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", running.port), timeout=5)


def test_a_port_that_is_taken_and_one_that_is_none(bundle: Path) -> None:
    model = EdgeModel.load(bundle, threads=1)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"cannot listen on 127.0.0.1:{port}"):
            serve(model, port=port)
    with pytest.raises(UsageError, match="cannot listen on"):
        serve(model, port=70_000)


def test_limits_that_let_nobody_in() -> None:
    with pytest.raises(UsageError, match="workers is 0"):
        Limits(workers=0)
    with pytest.raises(UsageError, match="queue is -1"):
        Limits(queue=-1)


def test_without_its_extra(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "starlette", None)
    with pytest.raises(MissingExtraError, match=r"pocketvlm\[serve\]"):
        make_app(EdgeModel.load(bundle, threads=1))
