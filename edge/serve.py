"""A bundle behind a small HTTP endpoint: embed, classify, health, OpenAPI. Starlette on uvicorn (extra `serve`).

Made for one machine: it listens on the loopback interface unless told otherwise, has no accounts, takes no paths and
keeps nothing. Everything that a client can make large is bounded: bodies, pixels, texts, labels, and how many requests
are inside at once; what is beyond is refused by 429 before its body is read.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pocketvlm.edge.contract import ModelContract
from pocketvlm.edge.errors import BadSampleError, IntegrityError, PocketvlmError, UsageError, counted, require
from pocketvlm.edge.model import EdgeModel
from pocketvlm.edge.openapi import describe

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_SHUTDOWN_S = 5
_THROWN_AWAY = 4


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a client may ask for.

    workers: requests that are computed at a time. queue: more that may wait; the next is answered with 429.
    body_bytes, text_body_bytes: of a picture, and of JSON. pixels: of a picture, before it is decoded. texts,
    text_chars: how many, and how long each. prompts: labels times templates of one classification. body_s: seconds to
    send a body.
    """

    workers: int = 2
    queue: int = 32
    body_bytes: int = 16 << 20
    text_body_bytes: int = 256 << 10
    pixels: int = 50_000_000
    texts: int = 64
    text_chars: int = 10_000
    prompts: int = 1024
    body_s: float = 10.0

    def __post_init__(self) -> None:
        for name in ("workers", "body_bytes", "text_body_bytes", "pixels", "texts", "text_chars", "prompts", "body_s"):
            if getattr(self, name) <= 0:
                raise UsageError(f"{name} is {getattr(self, name)} and must be above 0; nothing could be served")
        if self.queue < 0:
            raise UsageError(f"queue is {self.queue} and must be 0 or more; 0 means that nobody waits")


class _Refused(Exception):
    """An answer that is no result: its HTTP status and one sentence. close: hang up, as more would be sent."""

    def __init__(self, status: int, message: str, *, close: bool = False) -> None:
        super().__init__(message)
        self.status = status
        self.close = close


def make_app(model: EdgeModel, limits: Limits | None = None, *, hosts: tuple[str, ...] = LOOPBACK) -> Any:
    """The ASGI application; for tests, or for a server of yours.

    hosts: names that the Host header may have, so that no web page reaches a loopback server through a name of its own
    (DNS rebinding); ("*",) takes any.

    Raises:
        MissingExtraError: starlette is not installed.
    """
    require("starlette", "serve")
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.routing import Route

    service = _Service(model, limits or Limits())
    routes = [Route("/health", service.health), Route("/openapi.json", service.openapi)]
    if model.contract.image is not None:
        routes.append(Route("/embed/image", service.admitted(service.embed_image), methods=["POST"]))
        routes.append(Route("/classify", service.admitted(service.classify), methods=["POST"]))
    if model.tokenizer is not None:
        routes.append(Route("/embed/text", service.admitted(service.embed_text), methods=["POST"]))
    # an address such as [::1] is compared without its brackets by some releases and with them by others
    allowed = [*hosts, *(f"[{host}]" for host in hosts if ":" in host)]
    return Starlette(
        routes=routes,
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=allowed)],
        lifespan=service.lifespan,
    )


def serve(
    model: EdgeModel,
    *,
    host: str = "127.0.0.1",
    port: int = 8080,
    limits: Limits | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Serve until SIGINT or SIGTERM; requests that are inside are answered first, for at most five seconds.

    port: 0 takes any that is free. say: told the address, once it listens.

    Raises:
        MissingExtraError: starlette or uvicorn is not installed.
        UsageError: the address cannot be listened on.
    """
    uvicorn = require("uvicorn", "serve")
    local = host in LOOPBACK
    app = make_app(model, limits, hosts=LOOPBACK if local else ("*",))
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise UsageError(
            f"cannot listen on {host}:{port} ({error}); nothing was served, so choose another --port, or 0 for any"
        ) from error
    shown = f"[{host}]" if ":" in host else host
    with listening:
        # one connection costs a file and a few kilobytes; beyond, uvicorn itself answers 503 without calling us
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, timeout_graceful_shutdown=_SHUTDOWN_S, server_header=False,
            timeout_keep_alive=30, h11_max_incomplete_event_size=32 << 10, http="h11", ws="none",
        )  # fmt: skip
        say(f"serving {model} on http://{shown}:{listening.getsockname()[1]} (API: /openapi.json)")
        if not local:
            say(f"WARNING: {host} is reachable from other machines, and there is neither a password nor encryption")
        uvicorn.Server(config).run(sockets=[listening])


class _Service:
    def __init__(self, model: EdgeModel, limits: Limits) -> None:
        self.model = model
        self.limits = limits
        self.inside = 0
        self.refused = 0
        self.pool = ThreadPoolExecutor(limits.workers, thread_name_prefix="pocketvlm-serve")

    def lifespan(self, _: Any) -> Any:
        from contextlib import asynccontextmanager

        @asynccontextmanager
        async def running(_: Any) -> Any:
            yield
            self.pool.shutdown(wait=True, cancel_futures=True)

        return running(_)

    def admitted(self, answer: Callable[[Any], Awaitable[dict[str, Any]]]) -> Callable[[Any], Awaitable[Any]]:
        """A route: at most `workers + queue` of all of them are inside at once, and errors are one sentence."""

        async def handle(request: Any) -> Any:
            if self.inside >= self.limits.workers + self.limits.queue:
                self.refused += 1
                return _json(
                    {"error": f"{counted(self.inside, 'request')} are waiting already; ask again in a moment"},
                    429,
                    {"retry-after": "1"},
                )
            self.inside += 1
            try:
                return _json(await answer(request))
            except _Refused as error:
                return _json({"error": str(error)}, error.status, {"connection": "close"} if error.close else None)
            except IntegrityError as error:
                return _json({"error": str(error)}, 500)
            except PocketvlmError as error:
                reason = error.reason if isinstance(error, BadSampleError) else None
                return _json({"error": str(error), "reason": reason}, 413 if reason == "image-too-large" else 400)
            finally:
                self.inside -= 1

        return handle

    async def health(self, _: Any) -> Any:
        contract = self.model.contract
        return _json(
            {
                "status": "ok",
                "model": contract.name,
                "model_id": contract.model_id,
                "space_id": contract.space_id,
                "dim": self.model.dim,
                "backend": self.model.backend.name,
                "precision": self.model.variant.precision,
                "inside": self.inside,
                "refused": self.refused,
            }
        )

    async def openapi(self, _: Any) -> Any:
        return _json(describe(self.model.contract, self.limits))

    async def embed_image(self, request: Any) -> dict[str, Any]:
        data = await self._body(request, self.limits.body_bytes)
        return self._embeddings(await self._run(partial(self._embed_picture, data)))

    async def embed_text(self, request: Any) -> dict[str, Any]:
        texts = self._texts(await self._body(request, self.limits.text_body_bytes))
        return self._embeddings(await self._run(partial(self.model.embed_text, texts)))

    async def classify(self, request: Any) -> dict[str, Any]:
        labels, templates = (request.query_params.getlist(name) for name in ("label", "template"))
        templates = templates or ["{}"]
        if len(labels) * len(templates) > self.limits.prompts:
            asked = f"{counted(len(labels), 'label')} in {counted(len(templates), 'template')}"
            raise _Refused(413, f"{asked} are more than the {self.limits.prompts} prompts that are taken")
        if not labels and self.model.contract.kind != "classifier":
            raise _Refused(400, "no label was given, so there is nothing to tell apart; add ?label=NAME for each")
        data = await self._body(request, self.limits.body_bytes)
        return await self._run(partial(self._classify_picture, data, labels, templates))

    def _embed_picture(self, data: bytes) -> NDArray[np.float32]:
        self._check_pixels(data)
        return self.model.embed_image(data)

    def _classify_picture(self, data: bytes, labels: list[str], templates: list[str]) -> dict[str, Any]:
        self._check_pixels(data)
        (verdict,) = self.model.classify(data, labels or None, templates)
        return {"label": verdict.label, "probability": verdict.probability, "scores": verdict.scores}

    def _check_pixels(self, data: bytes) -> None:
        try:
            with Image.open(BytesIO(data)) as image:
                width, height = image.size
        except Exception:
            return  # decoding says what is wrong with it
        if width * height > self.limits.pixels:
            raise _Refused(
                413,
                f"the picture has {width} x {height} pixels and at most {self.limits.pixels} are taken; scale it down",
            )

    async def _run(self, work: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.pool, work)

    async def _body(self, request: Any, limit: int) -> bytes:
        stated = request.headers.get("content-length", "")
        length = int(stated) if stated.isdigit() and len(stated) < 16 else None
        # the rest of a body of moderate length is thrown away as it comes, so that its sender sees the answer
        endless = length is None or length > _THROWN_AWAY * limit
        message = f"the body is larger than {limit} bytes, which is all that is taken; send less"
        too_large = _Refused(413, message, close=endless)
        if length is not None and length > limit:
            raise too_large
        from starlette.requests import ClientDisconnect

        parts, size = [], 0
        try:
            async with asyncio.timeout(self.limits.body_s):
                async for part in request.stream():
                    size += len(part)
                    if size > limit:
                        raise too_large
                    parts.append(part)
        except ClientDisconnect:
            raise _Refused(400, "the body ended before it was whole") from None
        except TimeoutError:
            late = f"the body did not arrive within {self.limits.body_s:g} seconds"
            raise _Refused(408, late, close=True) from None
        return b"".join(parts)

    def _texts(self, body: bytes) -> list[str]:
        limits = self.limits
        wanted = 'give JSON like {"texts": ["a red boat"]}'
        try:
            texts = json.loads(body)["texts"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise _Refused(400, f"the body is no JSON object with 'texts'; {wanted}") from None
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise _Refused(400, f"'texts' is no list of strings; {wanted}")
        if not 1 <= len(texts) <= limits.texts:
            raise _Refused(413 if texts else 400, f"{len(texts)} texts were given and 1 to {limits.texts} are taken")
        if any(len(text) > limits.text_chars for text in texts):
            raise _Refused(413, f"a text is longer than {limits.text_chars} characters, which is all that is taken")
        return texts

    def _embeddings(self, rows: NDArray[np.float32]) -> dict[str, Any]:
        contract: ModelContract = self.model.contract
        return {"space_id": contract.space_id, "dim": rows.shape[1], "embeddings": rows.tolist()}


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Any:
    from starlette.responses import JSONResponse

    return JSONResponse(value, status, {"x-content-type-options": "nosniff", **(headers or {})})
