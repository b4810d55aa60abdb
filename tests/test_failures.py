"""backends/failures.py: what each server's way of saying no means."""

import json
import unittest
from dataclasses import replace
from typing import Any

from portway.backends.failures import CONTEXT_PHRASES, MAX_MESSAGE, classify, in_stream, is_loading, read_error
from portway.config import Backend
from portway.errors import FAILURES, BackendError

OLLAMA = Backend("ollama", "ollama", "http://127.0.0.1:11434", "http", "127.0.0.1", 11434)
CLOUD = Backend("cloud", "openai", "https://api.example/v1", "https", "api.example", 443, api_key="sk-1")

OVERFLOW = "request (6025 tokens) exceeds the available context size (2048 tokens), try increasing it"
NESTED = json.dumps({"error": {"code": 400, "message": OVERFLOW, "type": "exceed_context_size_error", "n_ctx": 2048}})

# (status, body as sent) -> reason, detail
CASES: list[tuple[int, Any, str, str]] = [
    # Ollama
    (404, {"error": "model 'x' not found"}, "model_not_found", ""),
    (404, {"error": 'model "x" not found, try pulling it first'}, "model_not_found", ""),
    (404, {"src": "llama-swap", "error": {"message": "no router for requested model"}}, "model_not_found", ""),
    (400, {"src": "llama-swap", "error": "could not find real modelID for x"}, "model_not_found", ""),
    (404, "404 page not found", "unsupported", "endpoint"),
    (405, "405 method not allowed", "unsupported", "endpoint"),
    (400, {"error": '"tiny" does not support thinking'}, "unsupported", "thinking"),
    (400, {"error": "registry.ollama.ai/library/x:latest does not support tools"}, "unsupported", "tools"),
    (400, {"error": "registry.ollama.ai/library/x:latest does not support insert"}, "unsupported", "insert"),
    (400, {"error": '"embed" does not support chat'}, "unsupported", "chat"),
    (400, {"error": '"embed" does not support generate'}, "unsupported", "completion"),
    (400, {"error": "raw mode does not support template, system, or context"}, "bad_request", ""),
    (400, {"error": "logprobs is not supported with tools + stream"}, "unsupported", "logprobs with tools"),
    (
        400,
        {"error": "Multimodal data provided, but model does not support multimodal requests."},
        "unsupported",
        "vision",
    ),
    (
        500,
        {"error": 'llama-server returned invalid tool call arguments for "f": unexpected end of JSON input'},
        "unsupported",
        "cut-off tool call",
    ),
    (400, {"error": NESTED}, "context_length_exceeded", ""),
    (
        400,
        {"error": "the prompt is longer than the context length currently available to the model; shorten the prompt"},
        "context_length_exceeded",
        "",
    ),
    (400, {"error": "the input length exceeds the context length"}, "context_length_exceeded", ""),
    (500, {"error": "input after truncation exceeds maximum context length"}, "context_length_exceeded", ""),
    (400, {"error": "illegal base64 data at input byte 4"}, "bad_request", ""),
    (500, {"error": 'option "stop" must be of type array'}, "bad_request", ""),
    (500, {"error": "json: unsupported value: +Inf"}, "bad_request", ""),
    (
        500,
        {
            "error": {
                "message": "Failed to parse messages: [json.exception.type_error.302] type must be string, but is null"
            }
        },
        "bad_request",
        "",
    ),
    (500, {"error": {"message": "[json.exception.out_of_range.403] key 'text' not found"}}, "bad_request", ""),
    (500, {"error": {"message": "Missing tool call type: true"}}, "bad_request", ""),
    (500, {"error": 'invalid format: "xml"; expected "json" or a valid JSON Schema object'}, "bad_request", ""),
    (
        503,
        {"error": "server busy, please try again.  maximum pending requests exceeded"},
        "busy",
        "",
    ),
    (500, {"error": "model requires more system memory (9.0 GiB) than is available"}, "server_error", "500"),
    (500, {"error": "llama runner process has terminated: signal: killed"}, "server_error", "500"),
    (500, {"error": "failed to allocate context length 131072"}, "server_error", "500"),
    (499, {"error": "context canceled"}, "server_error", "499"),
    (403, "", "backend_auth", "403"),
    # llama-server
    (
        400,
        {"error": {"code": 400, "message": OVERFLOW, "type": "exceed_context_size_error"}},
        "context_length_exceeded",
        "",
    ),
    (
        500,
        {
            "error": {
                "code": 500,
                "message": "input (754 tokens) is too large to process. increase the physical batch size",
                "type": "server_error",
            }
        },
        "context_length_exceeded",
        "",
    ),
    (
        501,
        {
            "error": {
                "code": 501,
                "message": "This server does not support embeddings. Start it with `--embeddings`",
                "type": "not_supported_error",
            }
        },
        "unsupported",
        "embedding",
    ),
    (501, {"error": {"code": 501, "message": "off", "type": "not_supported_error"}}, "unsupported", "endpoint"),
    (
        503,
        {"error": {"message": "Loading model", "type": "unavailable_error", "code": 503}},
        "loading_timeout",
        "",
    ),
    (
        401,
        {"error": {"code": 401, "message": "Invalid API Key", "type": "authentication_error"}},
        "backend_auth",
        "401",
    ),
    (404, {"error": {"code": 404, "message": "File Not Found", "type": "not_found_error"}}, "unsupported", "endpoint"),
    (
        400,
        {"error": {"code": 400, "message": "model 'nope' not found", "type": "invalid_request_error"}},
        "model_not_found",
        "",
    ),
    (
        500,
        {"error": {"code": 500, "message": "model name=broken failed to load", "type": "server_error"}},
        "server_error",
        "500",
    ),
    (
        500,
        {"error": {"code": 500, "message": "image input is not supported - hint: mmproj", "type": "server_error"}},
        "unsupported",
        "vision",
    ),
    (
        500,
        {"error": {"code": 500, "message": "Jinja Exception: roles must alternate", "type": "server_error"}},
        "template_error",
        "",
    ),
    (
        400,
        {"error": {"code": 400, "message": "'messages' is required", "type": "invalid_request_error"}},
        "bad_request",
        "",
    ),
    # others
    (
        400,
        {"error": {"message": "too long", "type": "invalid_request_error", "code": "context_length_exceeded"}},
        "context_length_exceeded",
        "",
    ),
    (
        404,
        {"error": {"message": "no access", "type": "invalid_request_error", "code": "model_not_found"}},
        "model_not_found",
        "",
    ),
    (
        404,
        {"object": "error", "message": "The model `x` does not exist.", "type": "NotFoundError", "code": 404},
        "model_not_found",
        "",
    ),
    (
        413,
        {"error": {"message": "Request too large for model", "type": "tokens", "code": "rate_limit_exceeded"}},
        "rate_limited",
        "",
    ),
    (429, {"error": {"message": "slow down"}}, "rate_limited", ""),
    (402, {"error": {"message": "no credit"}}, "backend_auth", "402"),
    (
        400,
        {"message": "The input (9 tokens) is longer than the model's context length (4 tokens)."},
        "context_length_exceeded",
        "",
    ),
    (413, "Request Entity Too Large", "bad_request", ""),
    (415, {"detail": "Unsupported Media Type"}, "bad_request", ""),
    (422, {"detail": [{"msg": "field required"}]}, "bad_request", ""),
    (408, "", "server_error", "408"),
    (502, "<html><h1>Bad Gateway</h1></html>", "server_error", "502"),
    (504, "", "server_error", "504"),
    (529, {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}, "busy", ""),
    (302, "", "bad_answer", "302"),
]


def encoded(body: object) -> bytes:
    return body.encode() if isinstance(body, str) else json.dumps(body).encode()


def failed(status: int, sent: object, backend: Backend = OLLAMA, **more: Any) -> BackendError:
    message, kind = read_error(encoded(sent))
    return classify(status, message, model="qwen:9b", backend=backend, type=kind, **more)


# what else says that the prompt does not fit, in the words of each server
OVERFLOWS = """
    This model's maximum context length is 4096 tokens. However, you requested 5000 tokens.
    The number of tokens to keep from the initial prompt is greater than the context length (n_keep: 9 >= n_ctx: 4).
    The input token count (9) exceeds the maximum number of tokens allowed (4).
    Prompt length 9 is greater than max_seq_len 4
    prompt is too long: 9 tokens > 4 maximum
    prompt too long; exceeded max context length by 5 tokens
    the request exceeded max context length
    Input is too long for requested model.
    Please reduce the length of the messages.
    Context length exceeded
    context window exceeded for this model
    Your input exceeds the context window of this model.
    the prompt exceeds the model's context of 4 tokens
    input exceeds maximum context length and cannot be truncated further
    exceed_context_size_error
    the request exceeds the available context size
""".strip().splitlines()

# what else says that something is missing
LACKS = [
    ("x is not a multimodal model", "vision"),
    ("this model does not support images", "vision"),
    ("this model does not support image input", "vision"),
    ("this model does not support completions", "completion"),
    ("this model does not support completion", "completion"),
    ("this model does not support vision", "vision"),
    ("tools param requires --jinja flag", "tools"),
    ('"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set', "tools"),
]

TEMPLATES = [
    "Conversation roles must alternate user/assistant/user/assistant/...",
    "template: :3:12: executing",
    "Failed to apply template",
    "default chat template is no longer allowed",
    "chat_template is needed",
]


class Classify(unittest.TestCase):
    def test_every_known_answer_has_its_reason(self):
        """The servers' own bodies, as seen, one by one; the status that a client sees follows."""
        for status, body, reason, detail in CASES:
            with self.subTest(status=status, body=body):
                error = failed(status, body)
                self.assertEqual((error.reason, error.detail), (reason, detail))
                seen = status if reason == "bad_request" and status < 500 else FAILURES[reason].status
                self.assertEqual(error.status, seen)

    def test_every_known_wording_is_understood(self):
        """Each phrase in the tables by a sentence that holds it."""
        for sentence in OVERFLOWS:
            for status in (400, 413, 500):
                with self.subTest(sentence, status=status):
                    self.assertEqual(failed(status, {"error": sentence}).reason, "context_length_exceeded")
        for phrase in CONTEXT_PHRASES:
            self.assertTrue(any(phrase in case.lower() for case in [*OVERFLOWS, str(CASES)]), phrase)
        for sentence, detail in LACKS:
            with self.subTest(sentence):
                error = failed(400, {"error": sentence})
                self.assertEqual((error.reason, error.detail), ("unsupported", detail))
        for sentence in TEMPLATES:
            with self.subTest(sentence):
                self.assertEqual(failed(500, {"error": sentence}).reason, "template_error")

    def test_a_servers_own_fault_stays_its_own(self):
        """Words that mean the request in a 4xx mean the server in a 500."""
        for sentence in ("rate_limit table is broken", "model file not found", "no such model runner"):
            self.assertEqual(failed(500, {"error": sentence}).reason, "server_error")
        self.assertEqual(failed(499, {"error": "rate_limit"}).reason, "rate_limited")
        self.assertEqual(failed(500, {"error": "Failed to parse tools: Unsupported tool type"}).reason, "bad_request")

    def test_the_servers_words_reach_the_client(self):
        """Clients match on wording, so it is kept; an empty one is replaced by a plain sentence."""
        self.assertEqual(failed(400, {"error": NESTED}).message, OVERFLOW)
        self.assertEqual(failed(500, "").message, "Backend 'ollama' answered 500 and gave no reason.")
        self.assertEqual(failed(502, "<html>x</html>").message, "Backend 'ollama' answered 502 and gave no reason.")

    def test_messages_are_bounded_and_printable(self):
        """A server's text can't flood or forge a log."""
        message = failed(500, {"error": "a\x1b[31m\rb" + "x" * 5000}).message
        self.assertTrue(message.startswith("a [31m b"))
        self.assertEqual(len(message), MAX_MESSAGE)

    def test_a_missing_model_names_the_way_out(self):
        """Ollama's is a pull; another server has none that would fit."""
        error = failed(404, {"error": "model 'qwen:9b' not found"})
        self.assertEqual(error.message, "Backend 'ollama' has no model 'qwen:9b'.")
        self.assertEqual(error.way_out, "ollama pull qwen:9b")
        self.assertEqual(failed(404, {"error": "model 'qwen:9b' not found"}, CLOUD).way_out, "")

    def test_refused_credentials_are_not_quoted(self):
        """The message is ours, for backends echo the key they refuse."""
        error = failed(401, {"error": {"message": "Incorrect API key provided: sk-abc"}}, CLOUD)
        self.assertEqual(error.message, "Backend 'cloud' refused the configured credentials (401).")
        self.assertEqual(error.way_out, "set the right api_key in [backends.cloud]")
        self.assertEqual(failed(402, {"error": {"message": "pay sk-abc"}}, CLOUD).way_out, "")

    def test_ollamas_two_refusals_are_told_apart(self):
        """An empty 403 is its guard of the Host header, the rest its cloud."""
        self.assertEqual(
            failed(403, "").message, "Backend 'ollama' does not accept the host name in its configured url (403)."
        )
        self.assertEqual(failed(403, "").way_out, "set the url in [backends.ollama] to an IP address or localhost")
        self.assertEqual(failed(401, {"error": "unauthorized"}).way_out, "ollama signin")
        self.assertEqual(failed(403, {"error": "remote model is unavailable"}).way_out, "ollama signin")
        with_key = replace(OLLAMA, api_key="sk-1")
        self.assertEqual(failed(401, "", with_key).way_out, "set the right api_key in [backends.ollama]")

    def test_only_a_bad_request_keeps_the_body(self):
        """It is what is forwarded as it came; Retry-After goes along with any."""
        body = encoded({"error": "illegal base64 data"})
        error = failed(400, {"error": "illegal base64 data"}, body=body, retry_after=7.0)
        self.assertEqual((error.body, error.retry_after), (body, 7.0))
        error = failed(429, {"error": "slow down"}, body=b"{}", retry_after=7.0)
        self.assertEqual((error.body, error.retry_after, error.status), (None, 7.0, 429))

    def test_loading_is_told_from_busy(self):
        """Only llama-server's 503 says that waiting helps."""
        self.assertTrue(is_loading(503, "Loading model"))
        self.assertFalse(is_loading(503, "server busy, please try again."))
        self.assertFalse(is_loading(500, "Loading model"))


class InStream(unittest.TestCase):
    def reason(self, error: object) -> str:
        return in_stream(error, model="m", backend=OLLAMA).reason

    def test_an_error_inside_a_200_is_read_like_any(self):
        """Ollama's string, OpenAI's object with a status, a textual code, or none; nested text too."""
        for error, reason in (
            ("an error was encountered while running the model: unexpected EOF", "server_error"),
            (NESTED, "context_length_exceeded"),
            ({"code": 400, "message": "nope", "type": "invalid_request_error"}, "bad_request"),
            ({"code": "429", "message": "slow"}, "rate_limited"),
            ({"code": "context_length_exceeded", "message": "x"}, "context_length_exceeded"),
            ({"code": 503, "message": "Loading model"}, "loading_timeout"),
            ({"code": True, "message": "x"}, "server_error"),
            ({"code": 200, "message": "x"}, "server_error"),
            ({"code": 99999, "message": "x"}, "server_error"),
            ({"message": None}, "server_error"),
            (None, "server_error"),
            (["x"], "server_error"),
            ("", "server_error"),
        ):
            with self.subTest(error=error):
                self.assertEqual(self.reason(error), reason)

    def test_a_code_that_is_no_status_counts_as_500(self):
        """Whatever a server put there, and whatever it did not say."""
        for code, status in (
            (400, "bad_request"),
            (599, "599"),
            (600, "500"),
            (399, "500"),
            ("x", "500"),
            (None, "500"),
        ):
            error = in_stream({"code": code, "message": "m"}, model="m", backend=OLLAMA)
            self.assertEqual(error.detail or error.reason, status)
        message = in_stream(["x"], model="m", backend=OLLAMA).message
        self.assertEqual(message, "Backend 'ollama' answered 500 and gave no reason.")


class ReadError(unittest.TestCase):
    def test_each_shape_gives_message_and_type(self):
        """What servers send as an error, down to none of their shapes."""
        for body, expected in (
            ({"error": "text"}, ("text", None)),
            ({"error": {"message": "m", "type": "t", "code": "c"}}, ("m", "t c")),
            ({"error": {"message": "m", "type": "t", "code": 400}}, ("m", "t")),
            ({"error": NESTED}, (OVERFLOW, "exceed_context_size_error")),
            ({"error": "{not json"}, ("{not json", None)),
            ({"message": "m", "type": "t"}, ("m", "t")),
            ({"detail": "d"}, ("d", None)),
            ({"error": {"error": "e"}}, ("e", None)),
            ({"detail": [1]}, ("", None)),
            ("[1]", ("[1]", None)),
            ("plain\n", ("plain", None)),
            ("<!doctype html>", ("", None)),
            ("", ("", None)),
            ("[" * 100_000, ("[" * 100_000, None)),
        ):
            with self.subTest(body=str(body)[:60]):
                self.assertEqual(read_error(encoded(body)), expected)

    def test_bytes_that_are_no_text_are_no_problem(self):
        """A broken body never hides the status."""
        self.assertEqual(read_error(b"\xffx"), ("\ufffdx", None))


if __name__ == "__main__":
    unittest.main()
