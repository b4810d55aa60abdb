"""What a backend's error means: from its status and words to a BackendError with a reason.

Both kinds of backend share this, since the same model servers stand behind both and the status
alone rarely tells: an overlong prompt is a 400 at one, a 500 at another, and only the wording shows
it. The phrases were collected from the servers' sources and from what was seen on the wire; they
are compared in lower case. Nothing here decides what follows from a reason: errors.FAILURES does.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from portway.errors import BackendError

if TYPE_CHECKING:
    from portway.config import Backend

KEY = "[api_key]"  # stands in for a backend's key in what it says
MAX_MESSAGE = 2000  # characters of a backend's own words that are passed on

# Statuses that need no words. 402: out of credit, so nothing on this backend will work; 529: overloaded.
_BY_STATUS = {
    401: "backend_auth",
    402: "backend_auth",
    403: "backend_auth",
    429: "rate_limited",
    503: "busy",
    529: "busy",
}

# The prompt does not fit the window. One phrase a server, newest wording first where they changed.
CONTEXT_PHRASES = (
    "exceeds the available context size",  # llama-server, chat and completions
    "exceed_context_size",  # llama-server's type
    "is too large to process",  # llama-server, embeddings (a 500): input larger than the physical batch
    "longer than the context length",  # Ollama, truncate: false
    "exceeds the context length",  # Ollama, /api/embed: "the input length exceeds .."
    "exceeds maximum context length",  # Ollama, /api/embed
    "exceeded max context length",  # Ollama's cloud: "prompt too long; .."
    "context_length_exceeded",  # OpenAI's code
    "context length exceeded",
    "maximum context length",  # OpenAI, vLLM, Mistral
    "longer than the model's context length",  # SGLang
    "greater than the context length",  # LM Studio
    "exceeds the model's context",
    "exceeds the maximum number of tokens",  # Gemini
    "greater than max_seq_len",  # TabbyAPI
    "context window exceeded",
    "exceeds the context window",
    "prompt is too long",  # Anthropic
    "prompt too long",
    "input is too long",
    "reduce the length of",
)

# What a model or server lacks -> the capability's name in attempts (config.CAPABILITIES where it has one).
_LACKS = re.compile(r"does not support (chat|completions?|embeddings?|generate|images?|insert|thinking|tools|vision)\b")
_CAPABILITY = {
    "completions": "completion",
    "embeddings": "embedding",
    "generate": "completion",
    "image": "vision",
    "images": "vision",
}
CUT_OFF_CALL = "cut-off tool call"
_UNSUPPORTED_PHRASES = (
    ("image input is not supported", "vision"),  # llama-server without --mmproj, a 500
    ("is not a multimodal model", "vision"),  # vLLM
    ("does not support multimodal", "vision"),  # Ollama, models with a Go template
    ("tools param requires", "tools"),  # llama-server without --jinja, a 500
    ("tool choice requires", "tools"),  # vLLM without --enable-auto-tool-choice
    ("logprobs is not supported with tools", "logprobs with tools"),  # Ollama and llama-server, streaming
    ("invalid tool call arguments", CUT_OFF_CALL),  # Ollama, a 500, when the limit fell inside a call
)
# What servers blame themselves for (500) though the request is at fault: no reason to cool them down.
_REQUEST_PHRASES = (
    "must be of type",  # Ollama: an option's type
    "invalid format:",
    "unsupported tool type",
    "unsupported value",  # Ollama: a number that its own arithmetic makes infinite
    "failed to parse messages",  # llama-server: a message's field of a type that its template can't have
    "json.exception",  # llama-server: likewise, elsewhere
    "missing tool call type",
)

# A chat template that these messages break: the same messages will break it again.
_TEMPLATE_PHRASES = ("jinja", "chat template", "chat_template", "roles must alternate", "apply template", "template: :")

_NO_MODEL = re.compile(
    r"model .*(not found|not exist)|no such model|model_not_found"
    r"|no router for (requested )?model|no router found for model|no peer model found"  # llama-swap
    r"|could not find (real modelid|suitable inference handler) for"  # llama-swap until 2026
)


def classify(
    status: int,
    message: str,
    *,
    model: str,
    backend: Backend,
    type: str | None = None,
    retry_after: float | None = None,
    body: bytes | None = None,
) -> BackendError:
    """The BackendError for an error answer.

    status: its HTTP status. message, type: as `read_error` gives them. model: the backend's own name
    of the model. retry_after: seconds from the Retry-After header. body: the answer's body; kept only
    where it is to be forwarded as it came (bad_request).
    """
    if backend.api_key is not None:  # some servers quote it
        message = message.replace(backend.api_key, KEY)
        body = body and body.replace(backend.api_key.encode(), KEY.encode())
    words = f"{message} {type or ''}".lower()
    message = _clean(message) or f"Backend '{backend.name}' answered {status} and gave no reason."
    reason, detail = _reason(status, words)
    if reason == "model_not_found":
        return _model_not_found(model, backend)
    if reason == "backend_auth":
        return _auth_refused(status, backend, empty=not words.strip())
    return BackendError(
        reason,
        message,
        detail=detail,
        status=status if reason == "bad_request" and status < 500 else None,
        retry_after=retry_after,
        body=body if reason == "bad_request" else None,
    )


def is_loading(status: int, message: str) -> bool:
    """Whether a server says that it is still loading the model: worth waiting for, nobody's failure."""
    return status == 503 and "loading model" in message.lower()


def in_stream(error: Any, *, model: str, backend: Backend) -> BackendError:
    """The BackendError for an error sent inside a 200: the value of a line's or event's `error` key.

    Ollama sends a string; OpenAI-compatible servers an object, whose `code` may be a status.
    """
    message, type = _parts(error)
    code = error.get("code") if isinstance(error, dict) else None
    try:
        status = int(code) if isinstance(code, (int, str)) else 500
    except ValueError:
        status = 500
    return classify(status if 400 <= status <= 599 else 500, message, model=model, backend=backend, type=type)


def read_error(body: bytes) -> tuple[str, str | None]:
    """(message, type) of an error answer's body. type: its `type` and `code` as words, None without any.

    Shapes seen: {"error":"text"} (Ollama), {"error":{"message","type","code"}} (OpenAI, llama-server),
    {"message","type"} (older vLLM), {"detail":"text"} (FastAPI), plain text (Go, gateways); and the
    second inside the first's text, where Ollama hands on what its runner said.
    """
    value = _document(body)
    if value is None:
        text = body.decode("utf-8", "replace").strip()
        return ("" if text.startswith("<") else text), None  # a gateway's HTML page says nothing to a client
    return _parts(value.get("error") or value)


def _document(text: bytes | str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _parts(error: Any) -> tuple[str, str | None]:
    if isinstance(error, str):
        inner = _document(error) if error.startswith("{") else None
        if inner is None:
            return error, None
        error = inner.get("error") or inner
    if not isinstance(error, dict):
        return "", None
    message = next((error[key] for key in ("message", "detail", "error") if isinstance(error.get(key), str)), "")
    kinds = [error[key] for key in ("type", "code") if isinstance(error.get(key), str)]
    return message, " ".join(kinds) or None


def _reason(status: int, words: str) -> tuple[str, str]:
    """(reason, detail), most telling sign first. words: message and type in lower case."""
    if is_loading(status, words):
        return "loading_timeout", ""
    if status in _BY_STATUS:
        return _BY_STATUS[status], ""
    if status < 400:  # a redirect, say
        return "bad_answer", str(status)
    return _by_words(status, words) or _by_class(status)


def _by_words(status: int, words: str) -> tuple[str, str] | None:
    asked = status < 500  # a server that says it is at fault may use the same words of itself
    if any(phrase in words for phrase in CONTEXT_PHRASES):
        return "context_length_exceeded", ""
    if detail := _lacking(words):
        return "unsupported", detail
    if any(phrase in words for phrase in _TEMPLATE_PHRASES):
        return "template_error", ""
    if asked and "rate_limit" in words:  # Groq's 413: more tokens than a minute's worth
        return "rate_limited", ""
    if asked and _NO_MODEL.search(words):
        return "model_not_found", ""
    if any(phrase in words for phrase in _REQUEST_PHRASES):
        return "bad_request", ""
    return None


def _by_class(status: int) -> tuple[str, str]:
    if status in (404, 405, 501):  # the server has no such endpoint, or it is switched off
        return "unsupported", "endpoint"
    if status < 500 and status not in (408, 499):  # it timed out, or (Ollama) cancelled by itself
        return "bad_request", ""
    return "server_error", str(status)


def _lacking(words: str) -> str:
    """The capability that the words say is missing, or ""."""
    if found := _LACKS.search(words):
        return _CAPABILITY.get(found[1], found[1])
    return next((detail for phrase, detail in _UNSUPPORTED_PHRASES if phrase in words), "")


def _model_not_found(model: str, backend: Backend) -> BackendError:
    way_out = f"ollama pull {model}" if backend.kind == "ollama" else ""
    return BackendError("model_not_found", f"Backend '{backend.name}' has no model '{model}'.", way_out=way_out)


def _auth_refused(status: int, backend: Backend, *, empty: bool) -> BackendError:
    """Its own words are not passed on: they like to quote the key."""
    message = f"Backend '{backend.name}' refused the configured credentials ({status})."
    way_out = f"set the right api_key in [backends.{backend.name}]"
    if status == 402:
        message, way_out = f"Backend '{backend.name}' asks for payment (402).", ""
    elif backend.kind == "ollama" and status == 403 and empty:  # its guard against DNS rebinding
        message = f"Backend '{backend.name}' does not accept the host name in its configured url (403)."
        way_out = f"set the url in [backends.{backend.name}] to an IP address or localhost"
    elif backend.kind == "ollama" and backend.api_key is None:  # a local Ollama asks only for its cloud models
        way_out = "ollama signin"
    return BackendError("backend_auth", message, detail=str(status), way_out=way_out)


def _clean(message: str) -> str:
    """Bounded, and without control characters, which could forge log lines."""
    return "".join(char if char.isprintable() or char == "\n" else " " for char in message[:MAX_MESSAGE]).strip()
