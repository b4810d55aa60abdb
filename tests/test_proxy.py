"""The daemon's own part: routes, requests, connections, reload and stop. Its backend is the stand-in."""

import contextlib
import json
import os
import select
import socket
import tempfile
import unittest
from contextlib import ExitStack, closing
from pathlib import Path
from unittest import mock

from portway import config, proxy
from portway.cache.store import Cache
from portway.commands import serve
from portway.standin.server import StandIn
from portway.telemetry import Log
from tests.daemon import Daemon, DaemonProcess
from tests.doubles import RawClient
from tests.llama_server import wait_for

ASK = {"model": "fast", "messages": [{"role": "user", "content": "Hello there"}]}


def toml(url, server="", models=""):
    """A configuration with the model `fast` behind the stand-in at `url`."""
    return f"""
        [server]
        {server}
        [backends.ollama]
        kind = "ollama"
        url = "{url}"
        [models.fast]
        backend = "ollama"
        model = "qwen3.5:9b"
        num_ctx = 4096
        aliases = ["gpt-4o-mini"]
        {models}
    """


def hangs(standin):
    """Whether a request is where release() lets it go on."""
    return any(request.phase == "hang" for request in standin.requests)


class ProxyTestCase(unittest.TestCase):
    server = ""
    models = ""

    def setUp(self):
        self.standin = self.enterContext(StandIn())
        self.daemon = self.enterContext(Daemon(toml(self.standin.url, self.server, self.models)))
        self.client = self.enterContext(self.daemon.client())

    def error(self, response):
        """The error in OpenAI's envelope, whose four members must be there."""
        error = response.json["error"]
        self.assertEqual({"message", "type", "param", "code"}, set(error))
        return error


class RouteTest(ProxyTestCase):
    def test_every_route_with_and_without_v1(self):
        """Each path answers under /v1 and without it."""
        for prefix in ("", "/v1"):
            self.assertEqual(200, self.client.call("POST", f"{prefix}/chat/completions", ASK).status)
            self.assertEqual(
                200, self.client.call("POST", f"{prefix}/completions", {"model": "fast", "prompt": "a"}).status
            )
            self.assertEqual(200, self.client.call("GET", f"{prefix}/models").status)
            self.assertEqual(200, self.client.call("GET", f"{prefix}/models/fast").status)
            self.assertEqual(200, self.client.call("GET", f"{prefix}/health").status)

    def test_unknown_paths(self):
        """An unknown path is 404 in the envelope and names those that exist; nothing reaches the backend."""
        before = len(self.standin.requests)
        for path in (
            "/",
            "/v1",
            "/v1/",
            "/v1/v1/models",
            "/api/tags",
            "/v1/chat/completions/",
            "/../v1/models",
            "//v1/models",
            "/v1//models",
            "/V1/models",
            "/v1/chat%2fcompletions",
        ):
            response = self.client.call("GET", path)
            self.assertEqual(404, response.status, path)
            self.assertIn("/v1/chat/completions", self.error(response)["message"])
        self.assertEqual([], [r for r in self.standin.requests[before:] if r.path not in ("/api/tags", "/api/show")])

    def test_wrong_method(self):
        """A known path with another method is 405 and says in Allow what it takes."""
        response = self.client.call("GET", "/v1/chat/completions")
        self.assertEqual(405, response.status)
        self.assertEqual("OPTIONS, POST", response.header("allow"))
        self.assertEqual("method_not_allowed", self.error(response)["code"])
        response = self.client.call("POST", "/v1/models", {})
        self.assertEqual("GET, HEAD, OPTIONS", response.header("allow"))
        self.assertEqual(405, self.client.call("DELETE", "/v1/models/fast").status)

    def test_head(self):
        """HEAD is GET without the body, Content-Length included."""
        got = self.client.call("GET", "/v1/models")
        head = self.client.call("HEAD", "/v1/models")
        self.assertEqual((200, b""), (head.status, head.body))
        self.assertEqual(str(len(got.body)), head.header("content-length"))
        self.assertEqual(200, self.client.call("GET", "/v1/models").status)

    def test_query_is_no_part_of_the_path(self):
        """`?beta=true` behind a path changes nothing."""
        self.assertEqual(200, self.client.call("GET", "/v1/models?limit=3").status)


class ModelsTest(ProxyTestCase):
    models = """
        fallback = ["small"]
        [models.small]
        backend = "ollama"
        model = "gemma3:1b"
    """

    def test_the_list(self):
        """Each model carries its window under three names, its backend and its chain."""
        listed = self.client.call("GET", "/v1/models").json
        self.assertEqual("list", listed["object"])
        fast, small = listed["data"]
        self.assertEqual(("fast", "model", "portway"), (fast["id"], fast["object"], fast["owned_by"]))
        self.assertEqual((4096, 4096, {"n_ctx": 4096}), (fast["context_length"], fast["context_window"], fast["meta"]))
        self.assertEqual(["fast", "small"], fast["portway"]["chain"])
        self.assertEqual(("ollama", "qwen3.5:9b"), (fast["portway"]["backend"], fast["portway"]["model"]))
        self.assertNotIn("context_length", small)

    def test_one_by_name_and_alias(self):
        """/v1/models/{id} takes a name or an alias, percent-encoded or not."""
        for name in ("fast", "gpt-4o-mini", "f%61st"):
            self.assertEqual("fast", self.client.call("GET", f"/v1/models/{name}").json["id"])

    def test_unknown_model(self):
        """An unknown name is 404 model_not_found with near names, for GET and POST alike."""
        response = self.client.call("GET", "/v1/models/fasst")
        self.assertEqual((404, "model_not_found"), (response.status, self.error(response)["code"]))
        self.assertIn("fast", self.error(response)["message"])
        response = self.client.call("POST", "/v1/chat/completions", {**ASK, "model": "fasst"})
        self.assertEqual((404, "model_not_found"), (response.status, self.error(response)["code"]))

    def test_model_must_be_named(self):
        """Without a model, or with one that is no string, 400 names the parameter."""
        bodies: list[dict[str, object]] = [{"messages": []}, {"model": None}, {"model": 3}, {"model": ""}]
        for body in bodies:
            response = self.client.call("POST", "/v1/chat/completions", body)
            self.assertEqual((400, "model"), (response.status, self.error(response)["param"]))


class RequestTest(ProxyTestCase):
    server = 'max_body = "128KB"\nheader_timeout = 0.2\nbody_timeout = 0.2\nidle_timeout = 0.2'

    def raw(self, data):
        self.client.send(data)
        return self.client.response()

    def test_keep_alive(self):
        """Many requests go over one connection, also after errors."""
        for _ in range(3):
            self.assertEqual(200, self.client.call("POST", "/v1/chat/completions", ASK).status)
            self.assertEqual(404, self.client.call("POST", "/nope", ASK).status)
            self.assertEqual(400, self.client.call("POST", "/v1/chat/completions", b"{").status)

    def test_chunked_body(self):
        """A chunked request body is taken, however it is cut."""
        body = json.dumps(ASK).encode()
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        chunks = b"".join(b"%x\r\n%b\r\n" % (len(body[i : i + 7]), body[i : i + 7]) for i in range(0, len(body), 7))
        response = self.raw(head + chunks + b"0\r\n\r\n")
        self.assertEqual(200, response.status)
        self.assertEqual("fast", response.json["model"])

    def test_expect_continue(self):
        """Expect: 100-continue is answered before the body is sent, and refused with the final status."""
        body = json.dumps(ASK).encode()
        fields = f"Host: localhost\r\nExpect: 100-continue\r\nContent-Length: {len(body)}"
        head = f"POST /v1/chat/completions HTTP/1.1\r\n{fields}\r\n\r\n"
        self.client.send(head.encode())
        self.assertEqual(100, self.client.head().status)
        self.assertEqual(200, self.raw(body).status)
        with self.daemon.client() as client:
            client.send(head.replace("Host: localhost", "Host: evil.example").encode())
            self.assertEqual(403, client.head().status)

    def test_http_1_0(self):
        """HTTP/1.0 gets an answer, unchunked, and the connection's end; keep-alive if it asks."""
        body = json.dumps({**ASK, "stream": True}).encode()
        head = f"POST /v1/chat/completions HTTP/1.0\r\nContent-Length: {len(body)}\r\n"
        response = self.raw((head + "Host: localhost\r\n\r\n").encode() + body)
        self.assertEqual(200, response.status)
        self.assertIsNone(response.header("transfer-encoding"))
        self.assertTrue(response.body.endswith(b"data: [DONE]\n\n"))
        self.assertTrue(self.client.at_end())
        with self.daemon.client() as client:
            client.send(b"GET /v1/models HTTP/1.0\r\nHost: localhost\r\nConnection: keep-alive\r\n\r\n")
            self.assertEqual("keep-alive", client.response().header("connection"))
            self.assertEqual(200, client.call("GET", "/v1/models").status)

    def test_connection_close(self):
        """Connection: close is honoured and said back."""
        response = self.client.call("GET", "/v1/models", headers={"Connection": "close"})
        self.assertEqual("close", response.header("connection"))
        self.assertTrue(self.client.at_end())

    def test_pipelining(self):
        """Requests sent ahead are answered one by one, in order."""
        request = b"GET /v1/models/fast HTTP/1.1\r\nHost: localhost\r\n\r\n"
        missing = b"GET /v1/models/none HTTP/1.1\r\nHost: localhost\r\n\r\n"
        self.client.send(request + missing + request)
        self.assertEqual([200, 404, 200], [self.client.response().status for _ in range(3)])

    def test_pipelining_behind_a_model(self):
        """A request sent while the model answers is kept and answered next."""
        body = json.dumps(ASK).encode()
        ask = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%b" % (
            len(body),
            body,
        )
        self.client.send(ask + ask)
        self.assertEqual(["fast", "fast"], [self.client.response().json["model"] for _ in range(2)])

    def test_body_too_large(self):
        """A body over server.max_body is 413 before it is read, and the connection ends."""
        self.client.send(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1073741824\r\n\r\n")
        response = self.client.response()
        self.assertEqual((413, "body_too_large"), (response.status, self.error(response)["code"]))
        self.assertIn("server.max_body", self.error(response)["message"])
        self.assertTrue(self.client.at_end())

    def test_chunked_body_too_large(self):
        """The bound holds for a chunked body, too, whose size nobody announces."""
        self.client.send(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
        self.client.send(b"20000\r\n" + b"x" * 0x20000 + b"\r\n10\r\n" + b"x" * 16 + b"\r\n")
        self.assertEqual(413, self.client.response().status)

    def test_bad_http(self):
        """What is not HTTP/1.1, or can be read in two ways, is 400 and the end of the connection."""
        host = b"Host: localhost\r\n"
        for data in (
            b"nonsense\r\n\r\n",
            b"GET http://localhost/v1/models HTTP/1.1\r\n" + host + b"\r\n",
            b"GET /v1/models HTTP/1.1\r\n\r\n",
            b"GET /v1/models HTTP/1.1\r\n" + host + host + b"\r\n",
            b"POST /v1/models HTTP/1.1\r\n" + host + b"Content-Length: 1\r\nContent-Length: 1\r\n\r\n",
            b"POST /v1/models HTTP/1.1\r\n" + host + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
            b"GET /v1/models HTTP/1.1\r\nHost : localhost\r\n\r\n",
            b"GET /v1/models HTTP/1.1\r\n" + host + b" folded\r\n\r\n",
        ):
            with self.daemon.client() as client:
                client.send(data)
                response = client.response()
                self.assertEqual((400, "close"), (response.status, response.header("connection")), data)
                self.error(response)
                self.assertTrue(client.at_end())

    def test_a_request_that_does_not_come_in(self):
        """Half a head, or half a body, is 408 after its time, and no thread waits for it."""
        for half in (
            b"GET /v1/mod",
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{",
        ):
            with self.daemon.client() as client:
                client.send(half)
                self.assertEqual(408, client.response().status)
                self.assertTrue(client.at_end())

    def test_a_request_that_drips(self):
        """Bytes that come one by one, but keep coming, get no more time than the whole body has."""
        self.client.send(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n")
        with contextlib.suppress(ConnectionError):  # its reset may overtake the word before it
            for _ in range(1000):
                self.client.send(b" ")
                if select.select([self.client.sock], [], [], 0.01)[0]:
                    break
            else:
                raise AssertionError("it was waited for ten seconds and more")
            self.assertEqual(408, self.client.response().status)

    def test_half_a_request_behind_a_long_one(self):
        """The time for a request begins with that request, however long the one before it took."""
        self.standin.fail("/api/chat", "hang")
        self.client.request("POST", "/v1/chat/completions", ASK)
        self.assertFalse(self.standin.wait_for(lambda _: False, timeout=0.3))  # longer than body_timeout
        self.client.send(b"GET /v1/models/fast HT")
        self.assertTrue(self.standin.wait_for(hangs))
        self.standin.release()
        self.assertEqual(200, self.client.response().status)
        self.client.send(b"TP/1.1\r\nHost: localhost\r\n\r\n")
        self.assertEqual(200, self.client.response().status)

    def test_an_idle_connection(self):
        """A connection without a request is closed without a word after server.idle_timeout."""
        self.client.call("GET", "/v1/models")
        self.assertTrue(self.client.at_end())

    def test_refused_before_the_body(self):
        """A refused request's small body is read, so that its connection lives on; a large one ends it."""
        foreign = {"Host": "evil.example"}
        self.assertEqual(403, self.client.call("POST", "/v1/chat/completions", ASK, foreign).status)
        self.assertEqual(200, self.client.call("GET", "/v1/models").status)
        response = self.client.call("POST", "/v1/chat/completions", b"x" * 65_537, foreign)
        self.assertEqual(403, response.status)

    def test_json_that_is_none(self):
        """Broken JSON of every kind is a 400 in the envelope."""
        for body in (b"", b"[]", b"{", b"\xff", b'{"a": NaN}', b"[" * 100_000, b'{"model": 1' + b"0" * 5000 + b"}"):
            response = self.client.call("POST", "/v1/chat/completions", body)
            self.assertEqual(400, response.status, body[:20])
            self.error(response)

    def test_form_content_type(self):
        """cron's `curl -d` is served although it calls its JSON a form."""
        form = {"Content-Type": "application/x-www-form-urlencoded"}
        self.assertEqual(200, self.client.call("POST", "/v1/chat/completions", ASK, form).status)


class CorsTest(ProxyTestCase):
    server = 'allowed_origins = ["http://localhost:3000"]'

    def test_preflight_of_a_listed_origin(self):
        """A listed origin's preflight is answered with what it may do."""
        response = self.client.call("OPTIONS", "/v1/chat/completions", headers={"Origin": "http://localhost:3000"})
        self.assertEqual((204, None), (response.status, response.header("content-length")))
        self.assertEqual("http://localhost:3000", response.header("access-control-allow-origin"))
        self.assertIn("POST", response.header("access-control-allow-methods") or "")

    def test_preflight_of_others(self):
        """Any other's is 403 and gives nothing away."""
        response = self.client.call("OPTIONS", "/v1/chat/completions", headers={"Origin": "https://evil.example"})
        self.assertEqual(403, response.status)
        self.assertIsNone(response.header("access-control-allow-origin"))

    def test_answers_carry_the_origin(self):
        """Plain, streamed and failed answers name the listed origin."""
        origin = {"Origin": "http://localhost:3000"}
        for body in (ASK, {**ASK, "stream": True}, {**ASK, "model": "none"}):
            response = self.client.call("POST", "/v1/chat/completions", body, origin)
            self.assertEqual("http://localhost:3000", response.header("access-control-allow-origin"))


class KeyTest(ProxyTestCase):
    server = 'api_keys = ["sk-one"]'

    def test_keys(self):
        """With keys configured only /health is open; a right key opens the rest and stays here."""
        self.assertEqual(200, self.client.call("GET", "/health").status)
        self.assertEqual(401, self.client.call("GET", "/v1/models").status)
        response = self.client.call("POST", "/v1/chat/completions", ASK, {"Authorization": "Bearer sk-two"})
        self.assertEqual((401, "invalid_api_key"), (response.status, self.error(response)["code"]))
        response = self.client.call("POST", "/v1/chat/completions", ASK, {"Authorization": "Bearer sk-one"})
        self.assertEqual(200, response.status)
        self.assertNotIn("sk-one", str([request.headers for request in self.standin.requests]))


class ConnectionTest(unittest.TestCase):
    def test_connections_need_no_thread(self):
        """Two hundred silent connections and two working ones: no thread for any of them."""
        with StandIn() as standin, Daemon(toml(standin.url)) as daemon:
            silent = [socket.create_connection(("127.0.0.1", daemon.port)) for _ in range(200)]
            try:
                standin.fail("/api/chat", "hang")
                with daemon.client() as client, daemon.client() as other:
                    client.request("POST", "/v1/chat/completions", ASK)
                    self.assertTrue(standin.wait_for(hangs))
                    self.assertEqual(200, other.call("POST", "/v1/chat/completions", ASK).status)
                    wait_for(lambda: other.call("GET", "/health").json["connections"] == 202, "all to be counted")
                    wait_for(lambda: daemon.in_flight == 1, "the others' ends")
                    self.assertEqual(0, daemon.workers)
                    standin.release()
                    self.assertEqual(200, client.response().status)
            finally:
                for sock in silent:
                    sock.close()

    def full(self, standin, daemon, count):
        """As many clients, of which the first two are being served and hang; the others wait for their turn."""
        standin.fail("/api/chat", "hang", times=2)
        clients = [self.enterContext(RawClient(daemon.port)) for _ in range(count)]
        for client in clients[:2]:
            client.request("POST", "/v1/chat/completions", ASK)
        self.assertTrue(standin.wait_for(lambda standin: sum(r.phase == "hang" for r in standin.requests) == 2))
        for client in clients[2:]:
            client.request("POST", "/v1/chat/completions", ASK)
        wait_for(lambda: daemon.backlog == count - 2, "the others' waiting")
        self.assertEqual(2, daemon.in_flight)
        return clients

    def test_more_requests_than_at_once(self):
        """Requests beyond server.max_requests wait for their turn and are answered."""
        with StandIn() as standin, Daemon(toml(standin.url, "max_requests = 2")) as daemon:
            clients = self.full(standin, daemon, 8)
            self.assertEqual(2, sum(request.path == "/api/chat" for request in standin.requests))
            standin.release()
            self.assertEqual([200] * 8, [client.response().status for client in clients])
            self.assertEqual(0, daemon.backlog)

    def test_who_leaves_before_its_turn(self):
        """No backend is asked for it; who waits behind it has its turn, and its next request as well."""
        with StandIn() as standin, Daemon(toml(standin.url, "max_requests = 2")) as daemon:
            first, second, leaver, other = self.full(standin, daemon, 4)
            other.request("GET", "/v1/models/fast")
            leaver.close()
            wait_for(lambda: daemon.connections == 3, "its leaving to be seen")
            standin.release()
            self.assertEqual([200] * 3, [client.response().status for client in (first, second, other)])
            self.assertEqual("fast", other.response().json["id"])
            self.assertEqual(3, sum(request.path == "/api/chat" for request in standin.requests))

    def test_a_mistake_behind_the_answer(self):
        """It costs the connection and a trace: the request has ended, and those who wait have their turn."""
        from portway.telemetry import Record

        # one that ends at once, one that ends on a worker, one that has waited
        for path, body in (("/v1/models/fast", None), ("/portway/residency", None), ("/v1/chat/completions", ASK)):
            with self.subTest(path), StandIn() as standin, Daemon(toml(standin.url, "max_requests = 1")) as daemon:
                mistake = mock.patch.object(Record, "finish", side_effect=RuntimeError("a mistake"))
                with mistake, mock.patch("threading.excepthook"), daemon.client() as client:
                    self.assertEqual(200, client.call("POST" if body else "GET", path, body).status)
                    self.assertTrue(client.at_end())
                    wait_for(lambda: daemon.in_flight == 0, "its end")
                with daemon.client() as client:
                    self.assertEqual(200, client.call("POST", "/v1/chat/completions", ASK).status)

    def test_a_mistake_in_the_log(self):
        """It is told, and costs nobody anything: not the connection, not the next record, not a scrape."""
        log = mock.Mock(problem=None, dropped=0, written=0)
        log.record.side_effect = [RuntimeError("a mistake"), None]
        with (
            mock.patch("portway.loop.REST", 60.0),
            StandIn() as standin,
            Daemon(toml(standin.url), log=log) as daemon,
            daemon.client() as client,
        ):
            for _ in range(2):
                self.assertEqual(200, client.call("POST", "/v1/chat/completions", ASK).status)
            page = client.call("GET", "/metrics")
            self.assertEqual(200, page.status)
            self.assertIn(b'status="2xx",cache="none",demoted="false"} 2', page.body)
            self.assertEqual(2, log.record.call_count)
            self.assertEqual(1, sum("a mistake" in said for said in daemon.log))

    def test_who_left_waits_no_longer(self):
        """Clients that leave and come again, as one with a short timeout does, leave nothing behind in the queue."""
        with StandIn() as standin, Daemon(toml(standin.url, "max_requests = 2")) as daemon:
            *_, leaver, last = self.full(standin, daemon, 4)
            leaver.close()
            wait_for(lambda: daemon.backlog == 1, "its leaving")
            last.reset()
            wait_for(lambda: daemon.backlog == 0, "the last one's leaving")
            standin.release()

    def test_requests_sent_ahead_wait_for_their_turn(self):
        """A client that sends its requests ahead keeps nobody waiting but for the one under way."""
        with StandIn() as standin, Daemon(toml(standin.url, "max_requests = 1")) as daemon:
            standin.fail("/api/chat", "hang")
            with daemon.client() as greedy, daemon.client() as other:
                for number in range(10):
                    greedy.request("POST", "/v1/chat/completions", {**ASK, "max_tokens": number + 1})
                self.assertTrue(standin.wait_for(hangs))
                other.request("POST", "/v1/chat/completions", {**ASK, "max_tokens": 99})
                wait_for(lambda: daemon.backlog == 1, "the other one's waiting")
                standin.release()
                self.assertEqual([200] * 11, [each.response().status for each in [other] + [greedy] * 10])
            asked = [each.json["options"]["num_predict"] for each in standin.requests if each.path == "/api/chat"]
            self.assertEqual([1, 99, *range(2, 11)], asked)

    def test_more_connections_than_allowed(self):
        """Past server.max_connections the connection that has been idle longest makes room."""
        self.enterContext(mock.patch.object(proxy, "FRESH", 0.0))
        with StandIn() as standin, Daemon(toml(standin.url, "max_connections = 3")) as daemon:
            clients = []
            for _ in range(4):
                clients.append(RawClient(daemon.port))
                self.assertEqual(200, clients[-1].call("GET", "/v1/models").status)
                # idle connections alone can make room, and an answer may be read before its request has ended
                wait_for(lambda: len(daemon.idle) >= min(len(clients), 3), "the connection's being idle")
            self.assertTrue(clients[0].at_end())
            self.assertEqual(200, clients[3].call("GET", "/v1/models").status)
            for client in clients:
                client.close()

    def test_evicted_in_the_round_in_which_its_request_came(self):
        """The loop lives on: it had made room before it saw that there is something to read."""
        with StandIn() as standin, Daemon(toml(standin.url)) as daemon, daemon.client() as client:
            wait_for(lambda: len(daemon.idle) == 1, "the connection")
            [handler] = daemon.idle
            server = handler.server
            with mock.patch.object(proxy, "FRESH", 0.0):
                self.assertTrue(server._evict(1))
            handler.stirred(1)
            self.assertTrue(client.at_end())
            with daemon.client() as another:
                self.assertEqual(200, another.call("GET", "/health").status)

    def test_a_request_is_not_idle(self):
        """Whoever has sent something makes no room for others: it would be reset, its request unread."""
        self.enterContext(mock.patch.object(proxy, "FRESH", 0.0))
        with StandIn() as standin, Daemon(toml(standin.url)) as daemon, daemon.client() as client:
            wait_for(lambda: len(daemon.idle) == 1, "the connection")
            [handler] = daemon.idle
            handler.server.shutdown()  # nobody takes it up
            client.send(b"GET /health HTTP/1.1\r\n")
            wait_for(lambda: not handler.is_silent, "the bytes")
            self.assertFalse(handler.server._evict(1))

    def test_a_new_connection_is_not_idle(self):
        """Its first request is on its way."""
        with StandIn() as standin, Daemon(toml(standin.url)) as daemon, daemon.client():
            wait_for(lambda: len(daemon.idle) == 1, "the connection")
            [handler] = daemon.idle
            with mock.patch.object(proxy, "FRESH", 60.0):
                self.assertFalse(handler.server._evict(1))
            with mock.patch.object(proxy, "FRESH", 0.0):
                self.assertTrue(handler.server._evict(1))


class QueueTest(unittest.TestCase):
    def test_waiting_for_a_place_is_written_down(self):
        """With max_parallel = 1 the second request waits, and its line in the log says how long."""
        import tempfile

        path = Path(self.enterContext(tempfile.TemporaryDirectory())) / "log.jsonl"
        log = Log(str(path))
        with StandIn() as standin:
            text = toml(standin.url).replace('kind = "ollama"', 'kind = "ollama"\nmax_parallel = 1')
            with Daemon(text, log=log) as daemon, daemon.client() as first, daemon.client() as second:
                standin.fail("/api/chat", "hang")
                first.request("POST", "/v1/chat/completions", ASK)
                self.assertTrue(standin.wait_for(hangs))
                second.request("POST", "/v1/chat/completions", ASK)
                self.assertFalse(standin.wait_for(lambda _: False, timeout=0.3))
                standin.release()
                self.assertEqual([200, 200], [client.response().status for client in (first, second)])
        self.assertTrue(log.close(5))
        waited = sorted(json.loads(line)["queue_s"] for line in path.read_text().splitlines())
        self.assertLess(waited[0], waited[1])
        self.assertGreater(waited[1], 0.05)


class ReloadTest(unittest.TestCase):
    def test_file_change_and_sighup(self):
        """A changed file, and SIGHUP, bring the new models; an invalid file leaves the old ones and says why."""
        import signal

        with StandIn() as standin, DaemonProcess(toml(standin.url)) as daemon, daemon.client() as client:
            daemon.configuration.write_text(toml(standin.url).replace("models.fast]", "models.new]"))
            wait_for(
                lambda: client.call("GET", "/v1/models/new").status == 200, "the file's change", lambda: daemon.log
            )
            daemon.configuration.write_text("[models.broken]\n")
            daemon.send(signal.SIGHUP)
            wait_for(lambda: client.call("GET", "/health").json["config"]["problem"], "the refusal", lambda: daemon.log)
            self.assertEqual(200, client.call("GET", "/v1/models/new").status)
            self.assertIn("models.broken", daemon.log)
            daemon.configuration.write_text(toml(standin.url))
            daemon.send(signal.SIGHUP)
            wait_for(lambda: client.call("GET", "/v1/models/fast").status == 200, "SIGHUP", lambda: daemon.log)
            self.assertIsNone(client.call("GET", "/health").json["config"]["problem"])

    def test_what_only_a_start_changes_is_said(self):
        """The bounds of log and cache are taken over; which files they are is not, and that is told."""
        with ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            standin = stack.enter_context(StandIn())
            log = Log(f"{folder}/log.jsonl")
            stack.callback(log.close, 5.0)
            cache = stack.enter_context(closing(Cache(f"{folder}/cache.sqlite3")))
            daemon = stack.enter_context(Daemon(toml(standin.url), log=log, cache=cache))
            client = stack.enter_context(daemon.client())
            bounds = '[log]\nmax_size = "64KB"\nkeep = 1\n[cache]\nmax_size = "1MB"\n'
            daemon.use(bounds + toml(standin.url))
            self.assertFalse([line for line in daemon.log if "next start" in line])
            for _ in range(1000):
                client.call("GET", "/v1/nothing")
            wait_for(lambda: os.path.exists(f"{folder}/log.jsonl.1.gz"), "the log's rotation")
            other = bounds.replace("[cache]", f'file = "{folder}/other"\n[cache]\nenabled = false')
            daemon.use(other + toml(standin.url, "max_requests = 3"))
            (told,) = [line for line in daemon.log if "next start" in line]
            self.assertEqual(
                "server.max_requests, log.file, cache.enabled: taken over at the next start, not before", told
            )

    def test_without_a_thread_to_ask_the_backends(self):
        """The new configuration is in force all the same, and the daemon lives."""
        with StandIn() as standin, Daemon(toml(standin.url)) as daemon, daemon.client() as client:
            client.call("GET", "/health")
            with mock.patch("threading.Thread.start", side_effect=RuntimeError("can't start new thread")):
                daemon.use(toml(standin.url).replace("models.fast]", "models.new]"))
            self.assertIn("not asked for their models", "\n".join(daemon.log))
            self.assertEqual(200, client.call("GET", "/v1/models/new").status)

    def test_requests_in_flight_end_on_the_old_one(self):
        """A stream that began before a reload ends as it began."""
        with StandIn() as standin, Daemon(toml(standin.url)) as daemon, daemon.client() as client:
            standin.fail("/api/chat", "hang_mid_stream")  # not the model: its /api/show would take it
            client.request("POST", "/v1/chat/completions", {**ASK, "stream": True})
            events = client.events(client.head())
            next(events)
            daemon.use(toml(standin.url).replace("models.fast]", "models.new]"))
            self.assertTrue(standin.wait_for(hangs))
            standin.release()
            said = [event.data for event in events]
            self.assertEqual("[DONE]", said[-1])
            self.assertEqual("fast", json.loads(said[0] or "")["model"])
            self.assertEqual(404, client.call("GET", "/v1/models/fast").status)


class StopTest(unittest.TestCase):
    def test_sigterm_drains(self):
        """At SIGTERM the stream in flight ends whole, and the exit code is 0."""
        import signal

        with StandIn() as standin, DaemonProcess(toml(standin.url)) as daemon, daemon.client() as client:
            standin.fail("/api/chat", "hang_mid_stream")  # not the model: its /api/show would take it
            client.request("POST", "/v1/chat/completions", {**ASK, "stream": True})
            events = client.events(client.head())
            next(events)
            daemon.send(signal.SIGTERM)
            with daemon.client() as late:
                wait_for(
                    lambda: late.call("GET", "/v1/models").status == 503,
                    "the refusal of new requests",
                    lambda: daemon.log,
                )
            self.assertTrue(standin.wait_for(hangs))
            standin.release()
            self.assertEqual("[DONE]", [event.data for event in events][-1])
            self.assertEqual(0, daemon.wait())

    def test_what_does_not_end_in_time(self):
        """At the end of `drain` each request gets a last word, a line in the log, and the exit code is 0."""
        import signal

        with StandIn() as standin, DaemonProcess(toml(standin.url, "drain = 0.2")) as daemon:
            with daemon.client() as streaming, daemon.client() as plain:
                standin.fail("/api/chat", "hang_mid_stream", times=2)
                streaming.request("POST", "/v1/chat/completions", {**ASK, "stream": True})
                events = streaming.events(streaming.head())
                next(events)
                plain.request("POST", "/v1/chat/completions", ASK)
                self.assertTrue(standin.wait_for(lambda standin: sum(r.phase == "hang" for r in standin.requests) == 2))
                daemon.send(signal.SIGTERM)
                last = [event.data for event in events][-1]
                self.assertEqual("stopping", json.loads(last or "")["error"]["code"])
                response = plain.response()
                self.assertEqual((503, "stopping"), (response.status, response.json["error"]["code"]))
                self.assertEqual(0, daemon.wait())
            self.assertIn("2 requests were cut", daemon.log)
            lines = [json.loads(line) for line in daemon.lines()]
            self.assertEqual([("stopping", 200), ("stopping", 503)], sorted((x["error"], x["status"]) for x in lines))

    def test_who_still_waits_for_an_answer(self):
        """At the end of `drain` half a request, and one that waits for its turn, get their last word, too."""
        import signal

        server = "drain = 0.2\nmax_requests = 1"
        with StandIn() as standin, DaemonProcess(toml(standin.url, server)) as daemon, ExitStack() as stack:
            standin.fail("/api/chat", "hang")
            served, queued, half = (stack.enter_context(daemon.client()) for _ in range(3))
            half.send(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{")
            served.request("POST", "/v1/chat/completions", ASK)
            self.assertTrue(standin.wait_for(hangs))
            queued.request("POST", "/v1/chat/completions", ASK)
            daemon.send(signal.SIGTERM)
            self.assertEqual([503] * 3, [client.response().status for client in (served, queued, half)])
            self.assertEqual(0, daemon.wait())
            lines = [json.loads(line) for line in daemon.lines()]
            self.assertEqual([("stopping", None)] * 3, [(line["error"], line["cancelled_in"]) for line in lines])

    def test_port_taken(self):
        """A port that is taken is a clear error, with the process that has it, and exit code 1."""
        import io
        import os
        import tempfile
        from dataclasses import replace

        home = self.enterContext(tempfile.TemporaryDirectory())
        with socket.create_server(("127.0.0.1", 0)) as holder:
            parsed = config.parse(toml("http://127.0.0.1:1"), "models.toml", {})
            port = holder.getsockname()[1]
            taken = replace(parsed, server=replace(parsed.server, port=port))
            with contextlib.redirect_stderr(io.StringIO()) as said:
                self.assertEqual(1, serve.serve(taken, config_path=None, environ={"HOME": home}))
            self.assertIn(f"127.0.0.1:{port}", said.getvalue())
            self.assertIn("server.port", said.getvalue())
            self.assertIn(f"pid {os.getpid()}", said.getvalue())


if __name__ == "__main__":
    unittest.main()
