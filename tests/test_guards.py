import hmac
import unittest
from unittest import mock

from portway import config
from portway.errors import ClientError
from portway.guards import Guards
from portway.keys import digest_of
from portway.wire.http1 import parse_request


def head(**fields):
    """A POST's head with these fields; an underscore in a name stands for a hyphen."""
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in {"Host": "localhost:11436", **fields}.items()]
    return parse_request("\r\n".join(["POST /v1/chat/completions HTTP/1.1", *lines]).encode())


def guards(server=""):
    """Guards of a configuration with these lines in [server]."""
    toml = f'[server]\n{server}\n[backends.b]\nkind = "ollama"\nurl = "http://127.0.0.1:1"\n'
    return Guards(config.parse(toml + '[models.m]\nbackend = "b"\nmodel = "x"\n', "models.toml", {}))


class HostTest(unittest.TestCase):
    def refused(self, host, server=""):
        with self.assertRaises(ClientError) as caught:
            guards(server).check(head(Host=host))
        self.assertEqual((403, "host_not_allowed"), (caught.exception.status, caught.exception.code))

    def test_loopback_names_and_literals(self):
        """Loopback by name and by address is let through, with any port or none, in any case."""
        for host in ("localhost", "LOCALHOST:1", "127.0.0.1:11436", "127.1.2.3", "[::1]", "[::1]:80", "a.localhost:9"):
            self.assertEqual({}, guards().check(head(Host=host)), host)

    def test_foreign_names(self):
        """Any other name is refused: it may be an attacker's, rebound to this machine."""
        for host in (
            "evil.example",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "notlocalhost",
            ":11436",
            "evil",
        ):
            self.refused(host)

    def test_malformed_host(self):
        """A port that is not one, or half a bracket, is no name of ours."""
        for host in ("localhost:evil.example", "[::1]evil", "[::1", "localhost:80:80", "user@localhost"):
            self.refused(host)

    def test_what_only_looks_like_loopback(self):
        """A number that is none to a resolver, a name of digits, an address of nobody's."""
        for host in (
            "localhost:\xb2",
            "127...1",
            "127.0.0.256",
            "127.0.0.1.",
            "127.1",
            "2130706433",
            "[evil:1]",
            "::1",
        ):
            self.refused(host)

    def test_addresses_of_other_machines(self):
        """While only loopback is listened on, an address that is not loopback can't be ours."""
        self.refused("192.168.1.5:11436")
        self.refused("[fe80::1]")

    def test_addresses_when_the_network_may_call(self):
        """Once another address is listened on, any IP literal will do: none can be rebound."""
        served = guards('host = "0.0.0.0"\napi_keys = ["sk-1"]')
        self.assertEqual({}, served.check(head(Host="192.168.1.5:11436")))

    def test_allowed_hosts(self):
        """server.allowed_hosts adds names, and only those."""
        served = guards('allowed_hosts = ["box.lan"]')
        self.assertEqual({}, served.check(head(Host="Box.LAN:11436")))
        with self.assertRaises(ClientError):
            served.check(head(Host="other.lan"))


class OriginTest(unittest.TestCase):
    def refused(self, **fields):
        with self.assertRaises(ClientError) as caught:
            guards('allowed_origins = ["http://localhost:3000"]').check(head(**fields))
        self.assertEqual((403, "origin_not_allowed"), (caught.exception.status, caught.exception.code))

    def test_foreign_origins(self):
        """A page of another site is refused, and so are a page without one and a file."""
        for origin in ("https://evil.example", "null", "http://localhost:3001", "http://localhost", "file://"):
            self.refused(Origin=origin)

    def test_a_listed_origin(self):
        """A listed origin is let through and named in the answer, never by a wildcard."""
        served = guards('allowed_origins = ["http://localhost:3000"]')
        cors = served.check(head(Origin="http://localhost:3000", Content_Type="application/json"))
        self.assertEqual("http://localhost:3000", cors["Access-Control-Allow-Origin"])
        self.assertEqual("Origin", cors["Vary"])

    def test_the_own_origin(self):
        """A page that this server itself would have sent may call it."""
        own = head(Origin="http://localhost:11436", Content_Type="application/json")
        self.assertEqual({}, guards().check(own))

    def test_requests_without_origin_from_a_page(self):
        """An image or a script tag sends no Origin, but Sec-Fetch-Site tells on it."""
        self.refused(Sec_Fetch_Site="cross-site")
        self.refused(Sec_Fetch_Site="same-site")
        self.assertEqual({}, guards().check(head(Sec_Fetch_Site="none", Content_Type="application/json")))

    def test_an_own_origin_proves_nothing_against_the_browsers_word(self):
        """Whoever says both is no browser that shows a page of ours."""
        self.refused(Origin="http://localhost:11436", Sec_Fetch_Site="cross-site")
        self.refused(Origin="http://localhost:11436", Sec_Fetch_Site="same-site")
        served = guards('allowed_origins = ["http://localhost:3000"]')
        listed = head(Origin="http://localhost:3000", Sec_Fetch_Site="same-site", Content_Type="application/json")
        self.assertTrue(served.check(listed))

    def test_content_types(self):
        """cron's `curl -d` may send a form's content type; a browser may not."""
        form = "application/x-www-form-urlencoded"
        self.assertEqual({}, guards().check(head(Content_Type=form)))
        self.assertEqual({}, guards().check(head()))
        with self.assertRaises(ClientError) as caught:
            guards().check(head(Content_Type=form, Origin="http://localhost:11436"))
        self.assertEqual(415, caught.exception.status)
        with self.assertRaises(ClientError):
            guards().check(head(Content_Type="text/plain", Sec_Fetch_Mode="cors"))
        json = head(Content_Type="Application/JSON; charset=utf-8", Origin="http://localhost:11436")
        self.assertEqual({}, guards().check(json))


class KeyTest(unittest.TestCase):
    def test_no_keys_configured(self):
        """Without configured keys none is asked for, and a client's own is no matter."""
        self.assertIsNone(guards().check_key(head()))
        self.assertIsNone(guards().check_key(head(Authorization="Bearer whatever")))

    def test_each_key_is_good(self):
        """Any of the configured keys opens."""
        served = guards('api_keys = ["sk-one", "sk-two"]')
        for given, number in (("Bearer sk-one", 0), ("bearer sk-two", 1), ("BEARER   sk-two ", 1)):
            found = served.check_key(head(Authorization=given))
            self.assertEqual(digest_of(f"sk-{('one', 'two')[number]}"), found.digest if found else None)

    def test_wrong_keys(self):
        """Anything else is 401, with what to send, and without the key in the message."""
        served = guards('api_keys = ["sk-one"]')
        wrong = (
            "Bearer sk-on",
            "Bearer sk-one1",
            "Bearer SK-ONE",
            "Basic sk-one",
            "sk-one",
            "Bearer",
            "Bearer \xff",
            "",
        )
        for value in (*wrong, f"Bearer {digest_of('sk-one').hex()}"):
            with self.assertRaises(ClientError) as caught:
                served.check_key(head(Authorization=value))
            self.assertEqual((401, "invalid_api_key"), (caught.exception.status, caught.exception.code))
            self.assertNotIn("sk-one", caught.exception.message)

    def test_no_key_is_never_a_key(self):
        """Not even where somebody has configured the hash of nothing."""
        served = guards(f'api_keys = ["sha256:{digest_of("").hex()}"]')
        for fields in ({}, {"Authorization": "Bearer "}, {"Authorization": "Basic x"}):
            with self.assertRaises(ClientError):
                served.check_key(head(**fields))

    def test_every_key_is_compared(self):
        """In a time that does not depend on which one it is, nor on how much of one is right."""
        served = guards('api_keys = ["sk-one", "sk-two", "sk-three"]')
        for given in ("sk-one", "sk-three", "wrong", ""):
            with mock.patch("portway.guards.hmac.compare_digest", side_effect=hmac.compare_digest) as compare:
                served.may_know_all(head(Authorization=f"Bearer {given}"))
            self.assertEqual(3, compare.call_count)
            self.assertEqual({32}, {len(side) for call in compare.call_args_list for side in call.args})


if __name__ == "__main__":
    unittest.main()
