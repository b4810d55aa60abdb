"""One request to the stand-in: routed, delayed, made to fail where it was told so, and answered."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from portway.standin import answers, faults, protocol
from portway.standin.answers import StandInModel
from portway.standin.faults import Fault
from portway.standin.memory import Resident
from portway.standin.speech import Shape, Speech, Timing, chat_shape, generate_shape, line
from portway.standin.wire import Bell, ClientLeft, HungUp, Stopped, Wire

if TYPE_CHECKING:
    from portway.standin.server import StandIn

VERSION = "0.33.0-portway-stand-in"
JSON = "application/json; charset=utf-8"
NDJSON = "application/x-ndjson"
UNCHUNKED = 2048  # bytes; Go chunks what is longer
MODIFIED = "2026-01-01T00:00:00Z"


@dataclass(slots=True, eq=False)
class Request:
    """One request as it came, and what became of it. Times are time.monotonic().

    phase: where it is or ended: "", "queue", "load", "prompt", "stream" or "hang". left: the client
    was seen to leave; `ended` says when. pieces: tokens sent so far.
    """

    method: str
    path: str  # without the query
    headers: list[tuple[str, str]]
    body: bytes
    json: Any  # None if the body isn't JSON
    connection: int  # 0 for the first one accepted
    started: float
    fault: Fault | None = None
    phase: str = ""
    left: bool = False
    pieces: int = 0
    ended: float | None = None

    @property
    def model(self) -> str:
        """The model's name as the client wrote it, "" if it named none."""
        return str(self.json.get("model") or "") if isinstance(self.json, dict) else ""

    def header(self, name: str) -> str | None:
        """The first such header's value."""
        return next((value for key, value in self.headers if key.lower() == name.lower()), None)


class Exchange:
    """One request and its answer."""

    def __init__(self, standin: StandIn, request: Request, wire: Wire) -> None:
        self.standin = standin
        self.request = request
        self.wire = wire
        self.fault = request.fault
        self.loaded_in = 0.0  # seconds until the model was there

    def run(self) -> bool:
        """Answer; True if the connection can go on to another request."""
        try:
            try:
                self._answer()
            except protocol.Refused as refused:
                self._refuse(refused)
        except ClientLeft:
            self.standin.note(self.request, left=True, ended=time.monotonic())
            return False
        except (HungUp, Stopped):
            self.standin.note(self.request, ended=time.monotonic())
            return False
        self.standin.note(self.request, ended=time.monotonic())
        return True

    def _answer(self) -> None:
        fault = self.fault
        self.wire.drip = self._told_to("slow_headers") or 0.0
        if fault is not None and fault.kind == "hang":
            self._hang()
        elif fault is not None and fault.instead:
            faults.play_instead(fault, self.wire)
            return
        methods = ROUTES.get(self.request.path)
        if not protocol.admits(self.request.header("Host"), self.request.header("Origin")):
            self.wire.respond(403, "text/plain", b"")
        elif methods is None:
            self._send(404, "text/plain", b"404 page not found")
        elif self.request.method not in methods:
            self.wire.respond(405, "text/plain", b"405 method not allowed", {"Allow": ", ".join(sorted(methods))})
        else:
            methods[self.request.method](self)

    # --- asked without loading anything

    def root(self) -> None:
        """GET /."""
        self._send(200, "text/plain; charset=utf-8", b"Ollama is running (not really: this is Portway's stand-in)")

    def version(self) -> None:
        """GET /api/version."""
        self._respond({"version": VERSION})

    def tags(self) -> None:
        """GET /api/tags."""
        self._respond({"models": [_listed(model) for model in self.standin.models.values()]})

    def ps(self) -> None:
        """GET /api/ps, the longest to stay first."""
        loaded = sorted(self.standin.memory.residents(self.standin.owner), key=lambda pair: -pair[1])
        self._respond({"models": [_running(resident, left) for resident, left in loaded if not resident.loading]})

    def show(self) -> None:
        """POST /api/show."""
        self._respond(_shown(protocol.read_show(self.request.body, self.standin.find)))

    # --- asked of a model

    def chat(self) -> None:
        """POST /api/chat."""
        self._generate(protocol.read_chat(self.request.body, self.standin.find), chat_shape)

    def generate(self) -> None:
        """POST /api/generate."""
        self._generate(protocol.read_generate(self.request.body, self.standin.find), generate_shape)

    def embed(self) -> None:
        """POST /api/embed."""
        order = protocol.read_embed(self.request.body, self.standin.find)
        resident = self._claim(order)
        try:
            protocol.check_runner(order)
            self._respond(self._embedded(order, resident.num_ctx - 1))  # one token marks the start
        finally:
            self.standin.memory.release(resident)

    def _embedded(self, order: protocol.Order, most: int) -> dict[str, Any]:
        texts = [answers.tokens(text) for text in order.inputs]
        if not order.truncate and any(len(text) > most for text in texts):
            raise protocol.Refused(400, "the input length exceeds the context length")
        length = order.model.embedding_length
        vectors = [answers.embedding("".join(text[:most]), length, order.dimensions) for text in texts]
        took = self._timing().to_json()
        end = {"total_duration": took["total_duration"], "load_duration": took["load_duration"]}
        end["prompt_eval_count"] = sum(min(len(text), most) for text in texts)
        return {"model": order.named, "embeddings": vectors, **(end if vectors else {})}

    def _generate(self, order: protocol.Order, shape: Shape) -> None:
        if order.unloads:
            self.standin.memory.unload(self.standin.owner, order.model)
            self._respond(line(order, shape(), done_reason="unload"))
            return
        resident = self._claim(order)
        try:
            if order.ask is None:
                self._respond(line(order, shape(), done_reason="load"))
                return
            protocol.check_runner(order)
            silent = self.fault is not None and self.fault.kind == "empty_answer"
            legacy = self.standin.legacy_tool_calls
            speech = Speech(order, order.ask, resident.num_ctx, shape, legacy=legacy, silent=silent)
            self._enter("prompt")
            self.wire.wait(self.standin.first_token_delay)
            if order.stream:
                self._stream(speech)
            else:
                self._whole(speech)
        finally:
            self.standin.memory.release(resident)

    def _stream(self, speech: Speech) -> None:
        fault = self.fault if self.fault is not None and self.fault.within else None
        if fault is not None and fault.hangs and fault.strikes_after <= 0:
            self.wire.start(NDJSON, speech.silence() if fault.strikes_after == 0 else b"")
            self._hang()
            fault = None
        for count, text in enumerate(self._spoken(speech)):
            if fault is not None and count in (fault.strikes_after, speech.pieces):
                if not fault.hangs:
                    self.wire.start(NDJSON)
                    faults.end_stream(fault, self.wire, text)
                    return
                self._hang()
                fault = None
            self.wire.start(NDJSON, text)
            self.standin.note(self.request, pieces=min(count + 1, speech.pieces))
        self.wire.finish()

    def _whole(self, speech: Speech) -> None:
        """stream: false. Its tokens take their time too, and nothing is sent before the last."""
        for _ in self._spoken(speech):
            pass
        answer = speech.whole(self._timing())
        if self.fault is not None and self.fault.hangs:
            self._hang()
        elif self.fault is not None and self.fault.within:
            faults.spoil_whole(self.fault, self.wire, answer)
            return
        self._respond(answer)
        self.standin.note(self.request, pieces=speech.pieces)

    def _spoken(self, speech: Speech) -> Iterator[bytes]:
        """The answer's lines, each after its time."""
        told = self._told_to("slow_tokens")
        delay = self.standin.token_delay if told is None else told
        self._enter("stream")
        for text in speech.lines():
            self.wire.wait(delay)
            yield text
        self.wire.wait(0)
        yield speech.last_line(self._timing())

    # --- the model

    def _claim(self, order: protocol.Order) -> Resident:
        """The loaded model, with this request counted among its users; waits and loads as need be."""
        memory, bell = self.standin.memory, Bell()
        memory.watch(bell)
        try:
            resident = self._take(order) or self._queue(order, bell)
        finally:
            memory.unwatch(bell)
            bell.close()
        if resident.loading:  # nobody but the one who is to load it is given it in this state
            self._load(resident)
        self.loaded_in = time.monotonic() - self.request.started
        return resident

    def _take(self, order: protocol.Order) -> Resident | None:
        standin = self.standin
        return standin.memory.claim(
            standin.owner, order.model, order.num_ctx, order.keep_alive, standin.parallel, order.variant
        )

    def _queue(self, order: protocol.Order, bell: Bell) -> Resident:
        if not self.standin.enter_queue():
            raise protocol.Refused(503, protocol.BUSY)
        try:
            self._enter("queue")
            while True:
                self.wire.wait(None, bell)
                bell.silence()
                if (resident := self._take(order)) is not None:
                    return resident
        finally:
            self.standin.leave_queue()

    def _load(self, resident: Resident) -> None:
        self._enter("load")
        told = self._told_to("slow_load")
        try:
            self.wire.wait(self.standin.load_delay if told is None else told)
        except (ClientLeft, Stopped):
            self.standin.memory.abandon(resident)
            raise
        self.standin.memory.loaded(resident)

    # --- the rest

    def _hang(self) -> None:
        self.standin.hang(self.request, self.wire)

    def _told_to(self, kind: str) -> float | None:
        """The seconds of the fault if it is of this kind."""
        return self.fault.seconds if self.fault is not None and self.fault.kind == kind else None

    def _enter(self, phase: str) -> None:
        self.standin.note(self.request, phase=phase)

    def _timing(self) -> Timing:
        return Timing(time.monotonic() - self.request.started, self.loaded_in)

    def _respond(self, obj: Any, status: int = 200) -> None:
        self._send(status, JSON, protocol.encode(obj))

    def _refuse(self, refused: protocol.Refused) -> None:
        body = protocol.encode({"error": refused.message})
        if refused.late and self.request.json.get("stream") is not False:  # a stream that came to nothing
            self.wire.start("application/json", body, refused.status)
            self.wire.finish()
        else:
            self._send(refused.status, JSON, body)

    def _send(self, status: int, content_type: str, body: bytes) -> None:
        if len(body) <= UNCHUNKED or self.request.method == "HEAD":
            self.wire.respond(status, content_type, body, head_only=self.request.method == "HEAD")
            return
        self.wire.start(content_type, body, status)
        self.wire.finish()


# path -> method -> what answers it. What else Ollama has (pull, delete ..) is not played.
ROUTES: Mapping[str, Mapping[str, Callable[[Exchange], None]]] = MappingProxyType(
    {
        "/": {"GET": Exchange.root, "HEAD": Exchange.root},
        "/api/version": {"GET": Exchange.version, "HEAD": Exchange.version},
        "/api/tags": {"GET": Exchange.tags, "HEAD": Exchange.tags},
        "/api/ps": {"GET": Exchange.ps},
        "/api/show": {"POST": Exchange.show},
        "/api/chat": {"POST": Exchange.chat},
        "/api/generate": {"POST": Exchange.generate},
        "/api/embed": {"POST": Exchange.embed},
    }
)


def _listed(model: StandInModel) -> dict[str, Any]:
    """A model in /api/tags, which looks for capabilities in fewer places than /api/show does."""
    unseen = ("tools", "thinking") if model.native else ()
    return {
        "name": protocol.full_name(model.name),
        "model": protocol.full_name(model.name),
        "modified_at": MODIFIED,
        "size": model.size_bytes,
        "digest": answers.digest(model),
        "details": {
            **protocol.details(model),
            "context_length": model.context_length,
            "embedding_length": model.embedding_length,
        },
        "capabilities": [capability for capability in model.capabilities if capability not in unseen],
    }


def _running(resident: Resident, seconds: float) -> dict[str, Any]:
    """A model in /api/ps."""
    return {
        "name": protocol.full_name(resident.model.name),
        "model": protocol.full_name(resident.model.name),
        "size": resident.size,
        "digest": answers.digest(resident.model),
        "details": protocol.details(resident.model),
        "expires_at": protocol.expiry(seconds),
        "size_vram": resident.size,
        "context_length": resident.num_ctx,
    }


def _shown(model: StandInModel) -> dict[str, Any]:
    """A model in /api/show."""
    return {
        "modelfile": f"# Portway's stand-in for {model.name}\n",
        "template": "{{ .Prompt }}",
        "details": protocol.details(model),
        "model_info": {
            "general.architecture": model.family,
            f"{model.family}.context_length": model.context_length,
            f"{model.family}.embedding_length": model.embedding_length,
        },
        "capabilities": list(model.capabilities),
        "modified_at": MODIFIED,
    }
