"""What a browser on this machine can be made to do: DNS rebinding, pages of other sites, SSRF, paths of others."""

import unittest

from portway.standin.server import StandIn
from scripts.torture_rows import attack_cases, attacks
from scripts.torture_rows.attacks import Connection
from tests.attacked import AttackCase
from tests.daemon import Daemon


class WebTest(AttackCase):
    server = 'allowed_hosts = ["box.lan"]\nallowed_origins = ["http://localhost:3000"]'

    def test_dns_rebinding(self):
        """A Host that is not ours is 403 on every path and method, an empty or doubled one 400."""
        self.holds(attacks.attack_dns_rebinding)

    def test_allowed_hosts(self):
        """A listed name is ours, with any port; one that only ends or begins like it is not."""
        with Connection(self.world.port) as client:
            for host in ("box.lan", "BOX.lan:1", "box.lan:65535"):
                self.assertEqual(200, client.ask("GET", "/v1/models", {"Host": host}).status, host)
            for host in ("xbox.lan", "box.lan.evil.example", "box.lan.", "a.box.lan", "box"):
                self.assertEqual(403, client.ask("GET", "/v1/models", {"Host": host}).status, host)

    def test_web_pages(self):
        """A page that was not listed is 403 on every path and method, and learns nothing by CORS."""
        self.holds(attacks.attack_web_pages)

    def test_a_listed_page(self):
        """A listed origin has its preflight answered and its name said back, never a wildcard; no other has."""
        origin = "http://localhost:3000"
        wish = {"Origin": origin, "Access-Control-Request-Method": "POST", "Sec-Fetch-Site": "same-site"}
        with Connection(self.world.port) as client:
            for path in attack_cases.PATHS:
                answer = client.ask("OPTIONS", path, wish)
                self.assertEqual((204, origin), (answer.status, answer.header("access-control-allow-origin")))
                self.assertEqual("Origin", answer.header("vary"))
            answer = client.ask("OPTIONS", "/v1/models")
            self.assertEqual([], [name for name, _ in answer.headers if name.startswith("access-control")])
            answer = client.ask("POST", "/v1/embeddings", {"Origin": origin, "Content-Type": "text/plain"}, b"{}")
            self.assertEqual(415, answer.status)  # as JSON it has to ask first

    def test_a_form_without_a_browser(self):
        """cron's `curl -d` calls its JSON a form, and is served."""
        with Connection(self.world.port) as client:
            body = b'{"model":"fast","messages":[{"role":"user","content":"hi"}]}'
            for kind in attack_cases.FORM_TYPES:
                answer = client.ask("POST", "/v1/chat/completions", {"Content-Type": kind}, body)
                self.assertEqual(200, answer.status, kind)

    def test_remote_images(self):
        """An address is refused with what to send instead, and no backend ever sees it."""
        before = len(self.world.reached)
        self.holds(attacks.attack_remote_images)
        self.assertEqual([], self.world.reached[before:])

    def test_foreign_paths(self):
        """What is not in the route table is 404 and reaches no backend."""
        before = len(self.world.reached)
        self.holds(attacks.attack_foreign_paths)
        self.assertEqual([], self.world.reached[before:])

    def test_header_injection(self):
        """Nothing that a client names, in a body, a path or a header, becomes a header or a line of the answer."""
        self.holds(attacks.attack_header_injection)


class ReloadTest(unittest.TestCase):
    def test_who_was_let_in_is_looked_at_anew(self):
        """A host or origin that a reload takes from the lists is refused from the next request on, and one that it
        adds let in, also where the same head was answered a moment before."""
        with StandIn() as standin:
            plain = f'[backends.b]\nkind = "ollama"\nurl = "{standin.url}"\n[models.m]\nbackend = "b"\nmodel = "x"\n'
            listed = f'[server]\nallowed_hosts = ["box.lan"]\nallowed_origins = ["http://a.example"]\n{plain}'
            heads = ({"Host": "box.lan"}, {"Origin": "http://a.example"})
            with Daemon(listed) as daemon, Connection(daemon.port) as client:
                for toml, status in ((listed, 200), (plain, 403), (listed, 200), (plain, 403)):
                    daemon.use(toml)
                    for head in heads * 2:
                        self.assertEqual(status, client.ask("GET", "/v1/models", head).status)


if __name__ == "__main__":
    unittest.main()
