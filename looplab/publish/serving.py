"""`looped serve`: an OpenAI-compatible server of one saved model; each request may choose its loop count.

    serving.py            the endpoints, on Starlette and uvicorn
    serving_requests.py   the fields of a request, and the rules they are checked by
    serving_jobs.py       requests at work at the same time
    serving_batch.py      what computes those of a looped model
    serving_threads.py    what computes those of a looped frozen model

`transformers serve` cannot be extended to this: it answers one request after the other, has no limits, and loads
whatever model a request names. The model runs with this package's code, not with the copy saved in its folder.
"""

import asyncio
import contextlib
import json
import os
import socket
import time
import uuid
from collections.abc import AsyncIterator, Coroutine
from functools import partial

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from transformers import PreTrainedConfig

from looplab.runs.models import blaming, load_model
from looplab.runs.sources import find
from modeling_looped import FrozenLoopedForCausalLM, LoopedForCausalLM

from .limits import Limits, option
from .serving_jobs import Job, Service
from .serving_requests import CHAT, COMPLETION, Refusal, read_fields, short

MODELS = {each.__name__ for each in (LoopedForCausalLM, FrozenLoopedForCausalLM)}
REMEDY = "name a folder that save_pretrained wrote, such as RUN/model."
DISCARDING = 1.0  # seconds that a refused body is read on


class Completions:
    """The endpoint /v1/completions: the rules of its requests, and the form of its answers."""

    path, rules, prefix = "/v1/completions", COMPLETION, "cmpl-"
    kind = piece_kind = "text_completion"

    def choice(self, text: str, reason: str | None) -> dict:
        """The whole answer, or with `piece` a piece of a stream. reason: why it ends, None before the end."""
        return {"index": 0, "text": text, "logprobs": None, "finish_reason": reason}

    def opening(self) -> list[dict]:
        """Pieces that a stream sends before its first text."""
        return []

    piece = choice


class Chats(Completions):
    """The endpoint /v1/chat/completions."""

    path, rules, prefix = "/v1/chat/completions", CHAT, "chatcmpl-"
    kind, piece_kind = "chat.completion", "chat.completion.chunk"

    def choice(self, text, reason):
        message = {"role": "assistant", "content": text}
        return {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}

    def opening(self):
        return [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]

    def piece(self, text, reason):
        return {"index": 0, "delta": {"content": text} if text else {}, "finish_reason": reason}


class Stream(StreamingResponse):
    """The server-sent events of a job. The job ends when its client leaves."""

    def __init__(self, job: Job, lines: AsyncIterator[str]):
        super().__init__(lines, headers={"cache-control": "no-cache"}, media_type="text/event-stream")
        self.job = job

    async def __call__(self, scope, receive, send):
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.job.leave()


def as_json(body: dict, status: int = 200) -> Response:
    return Response(json.dumps(body), status, media_type="application/json")


def as_event(body: dict) -> str:
    return f"data: {json.dumps(body)}\n\n"


async def read_body(request: Request, limits: Limits) -> bytes:
    """The body of a request. Raises Refusal if it is too long, takes too long, or is not declared to be JSON."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # this also keeps pages of other sites out: browsers ask before they send JSON
        raise Refusal(f"the content type must be application/json, got {short.repr(kind)}.", status=415)
    body, length = bytearray(), int(request.headers.get("content-length", 0))
    try:
        async with asyncio.timeout(limits.max_seconds):
            if length <= limits.max_body_bytes:
                async for part in request.stream():
                    body += part
                    if (length := len(body)) > limits.max_body_bytes:
                        break
    except TimeoutError as error:
        raise Refusal(f"the body took longer than {limits.max_seconds} seconds.", status=408) from error
    if length > limits.max_body_bytes:
        if "expect" not in request.headers:  # a client that sends "expect" waits before it sends the body
            await discard(request)
        raise Refusal(
            f"the body is longer than {limits.max_body_bytes} bytes, the server's limit ({option('max_body_bytes')}).",
            status=413,
        )
    return bytes(body)


async def discard(request: Request) -> None:
    """Read on for a while: most clients read the answer only when they have sent all, and closing would lose it."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DISCARDING):
            while (await request.receive()).get("more_body"):
                pass


async def until_left(request: Request) -> None:
    """Wait until the client leaves."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def unless_left(request: Request, work: Coroutine[None, None, Response]) -> Response:
    """The response of `work`, which is cancelled if the client leaves."""
    working, leaving = asyncio.create_task(work), asyncio.create_task(until_left(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else Response()
    finally:
        working.cancel()
        leaving.cancel()


async def respond(service: Service, endpoint: Completions, request: Request) -> Response:
    """Read and answer one request; a Refusal becomes its HTTP response."""
    try:
        body = await read_body(request, service.limits)
        fields = await asyncio.to_thread(read_fields, body, endpoint.rules, service.bounds)
        if fields.get("model", service.name) != service.name:
            name = short.repr(fields["model"])
            raise Refusal(f"there is no model {name} here, but {service.name!r}.", "model", status=404)
        return await unless_left(request, answer(service, endpoint, fields))
    except Refusal as refusal:
        return as_json(refusal.body(), refusal.status)
    except ClientDisconnect:
        return Response()


async def answer(service: Service, endpoint: Completions, fields: dict) -> Response:
    """Run the job of a request with checked fields. Raises Refusal."""
    streams = fields.get("stream", False)
    job = service.admit(streams)
    try:
        plan = await asyncio.to_thread(service.plan, fields)
        await service.reserve(job, plan.cache_bytes)
        job.start(plan)
        first = await job.events.get()  # a refusal can have an HTTP status only while nothing is sent
        if isinstance(first, Refusal):
            raise first
    except BaseException:
        job.leave()
        raise
    head = {"id": endpoint.prefix + uuid.uuid4().hex, "created": int(time.time()), "model": service.name}
    if streams:
        with_usage = fields.get("stream_options", {}).get("include_usage", False)
        return Stream(job, pieces(endpoint, job, first, head | {"object": endpoint.piece_kind}, with_usage))
    choices = [endpoint.choice(job.text, job.finish_reason())]
    return as_json(head | {"object": endpoint.kind, "choices": choices, "usage": job.usage()})


async def pieces(
    endpoint: Completions, job: Job, event: str | Refusal | None, head: dict, with_usage: bool
) -> AsyncIterator[str]:
    """The lines of a stream.

    Args:
        event: the first event of the job, see `Job`.
        head: fields that every piece has.
        with_usage: end with the token counts.
    """
    for choice in endpoint.opening():
        yield as_event(head | {"choices": [choice]})
    while isinstance(event, str):
        yield as_event(head | {"choices": [endpoint.piece(event, None)]})
        event = await job.events.get()
    if event is not None:
        yield as_event(event.body())
        return
    yield as_event(head | {"choices": [endpoint.piece("", job.finish_reason())]})
    if with_usage:
        yield as_event(head | {"choices": [], "usage": job.usage()})
    yield "data: [DONE]\n\n"


def make_app(service: Service) -> Starlette:
    """The endpoints of a service: /health, /v1/models, /v1/completions, /v1/chat/completions."""

    async def health(request: Request) -> Response:
        return as_json({"status": "ok"})

    async def models(request: Request) -> Response:
        model = {"id": service.name, "object": "model", "created": service.created, "owned_by": "looped"}
        return as_json({"object": "list", "data": [model]})

    async def not_here(request: Request, error: HTTPException) -> Response:
        places = ", ".join(route.path for route in routes)
        sentence = f"{request.method} {short.repr(request.url.path)}: {error.detail}; there is {places}."
        return as_json(Refusal(sentence, status=error.status_code).body(), error.status_code)

    async def failed(request: Request, error: Exception) -> Response:  # uvicorn logs the traceback
        return as_json(Refusal("the server failed at this request; its log says why.", status=500).body(), 500)

    routes = [Route("/health", health), Route("/v1/models", models)]
    for endpoint in (Completions(), Chats()):
        routes.append(Route(endpoint.path, partial(respond, service, endpoint), methods=["POST"]))
    return Starlette(routes=routes, exception_handlers={HTTPException: not_here, Exception: failed})


class Server(uvicorn.Server):
    """At the first SIGTERM or SIGINT the server answers the requests at work, within the grace period, and ends with
    exit status 0. At the second it ends at once."""

    def __init__(self, service: Service):
        grace = service.limits.grace_seconds + 1  # one second more to tell the clients
        super().__init__(
            uvicorn.Config(
                make_app(service),
                lifespan="off",
                ws="none",
                proxy_headers=False,
                server_header=False,
                timeout_graceful_shutdown=grace,
            )
        )
        self.service = service

    def handle_exit(self, sig, frame):
        if self.should_exit:
            os._exit(128 + sig)
        self.service.close()
        self.should_exit = True


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to an address.

    Raises:
        OSError: the address is not free.
    """
    # IPPROTO_TCP is named because asyncio turns the delay of small packets off only for such a socket.
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise OSError(f"cannot listen at {host}, port {port}: {error}.") from error
    return listener


def check_kind(model: str) -> None:
    """Check, before any weights are read, that `model` can be served.

    Raises:
        ValueError: it is a model of another kind.
    """
    with blaming(model, REMEDY):
        kinds = PreTrainedConfig.get_config_dict(model)[0].get("architectures")
    if not isinstance(kinds, list) or not MODELS & set(kinds):
        raise ValueError(
            f"{model} is a model of {kinds}, and looped serve serves {' and '.join(sorted(MODELS))}: `transformers "
            "serve` may have it."
        )


def serve(
    model: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    device: str | None = None,
    limits: Limits = Limits(),  # noqa: B008 (frozen)
) -> None:
    """Serve a model until SIGTERM or SIGINT.

    Args:
        model: a name for `sources.find`; requests name it the same way.
        device: the accelerator if there is one, unless given.

    Raises:
        ValueError: as `find`, `check_kind`, `load_model` and `Service`.
        OSError: as `listen`.
    """
    folder = str(find(model).model_folder())
    check_kind(folder)
    with listen(host, port) as listener:
        service = Service(*load_model(folder, REMEDY, device=device), model, limits)
        address = f"[{host}]" if ":" in host else host
        print(f"{model} is served at http://{address}:{listener.getsockname()[1]}; ctrl-c ends it", flush=True)
        Server(service).run(sockets=[listener])
    if service.jobs:  # a loop took longer than the grace period, and Python would wait for its thread
        os._exit(0)
