"""Too slow, too many, too much: what would use up a daemon that waits for everybody and keeps everything."""

import resource
import subprocess
import sys
import unittest
from unittest import mock

from scripts.torture_rows import attacks
from scripts.torture_rows.attacks import Connection
from tests.attacked import MB, AttackCase, Attacked
from tests.daemon import ROOT

BODY = b'{"model":"flood","stream":true,"messages":[{"role":"user","content":"hi"}]}'
STREAM = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%b" % (len(BODY), BODY)
HAS_PROC = sys.platform.startswith("linux")


class LoadTest(AttackCase):
    def test_slow_heads(self):
        """200 heads that come a byte at a time end with 408 in their time; others are answered meanwhile."""
        self.holds(attacks.attack_slow_heads)

    def test_slow_bodies(self):
        """The same with bodies."""
        self.holds(attacks.attack_slow_bodies)

    def test_huge_bodies(self):
        """A gigabyte is refused with 413 before it is read, announced or not, and is never in memory."""
        before = self.world.check().rss
        self.holds(attacks.attack_huge_bodies)
        self.assertLess(self.world.check().rss - before, 64 * MB)

    def test_hostile_json(self):
        """Depth, numbers, duplicates, encodings: a clear 400, or no harm done."""
        self.holds(attacks.attack_hostile_json)

    def test_unread_answers(self):
        """Pipelined requests without a reader take no memory and no place of others."""
        before = self.world.check().rss
        self.holds(attacks.attack_unread_answers)
        self.assertLess(self.world.check().rss - before, 64 * MB)


class IdleTest(AttackCase):
    @unittest.skipUnless(HAS_PROC, "needs /proc")
    def test_idle_connections(self):
        """10,000 of them cost a descriptor each, no thread, and little memory."""
        before = self.world.check()
        seen = []
        with mock.patch.object(self.world, "check", lambda: seen.append(Attacked.check(self.world))):
            self.holds(attacks.attack_idle_connections)
        during = max(seen, key=lambda counts: counts.descriptors)
        self.assertGreater(during.descriptors - before.descriptors, 9_990)
        self.assertLess(during.threads, 64)
        self.assertLess(during.rss - before.rss, 300 * MB)


class UnreadStreamTest(AttackCase):
    def test_unread_streams(self):
        """A stream that nobody reads is held back at its source and costs others nothing."""
        before = self.world.check()
        self.holds(attacks.attack_unread_streams)
        self.assertLess(self.world.check().rss - before.rss, 64 * MB)

    def test_a_stream_that_is_never_read(self):
        """It ends in time, its client being there still, and so does the work behind it."""
        with attacks.connect(self.world.port) as sock:
            sock.sendall(STREAM)
            self.assertEqual(b"HTTP/1.1 200", sock.recv(12))
            *_, asked = [request for request in self.world.flooding.requests if request.method == "POST"]
            self.assertGreater(self.world.flooding.wait_closed(asked.connection) - asked.at, 1.0)

    def test_a_stream_that_is_read_again(self):
        """Whoever pauses for less than server.write_timeout loses nothing of its own stream."""
        with attacks.connect(self.world.port) as sock:
            sock.sendall(STREAM)
            self.assertTrue(sock.recv(1))
            self.world.check()
            seen = sum(len(sock.recv(65_536)) for _ in range(200))
        self.assertGreater(seen, 65_536)


class StalledLeaderTest(unittest.TestCase):
    def test_a_reader_that_stalls_holds_up_nobody_who_waits_for_the_same(self):
        """Of two identical requests the second is served though the first never reads its answer."""
        with mock.patch.object(Attacked, "write_timeout", 600.0), Attacked("heartbeat = 600") as world:
            before = world.check()
            request = STREAM.replace(b'"flood"', b'"shared"').replace(b"Length: 75", b"Length: 76")
            with attacks.connect(world.port) as stalled, attacks.connect(world.port) as other:
                stalled.sendall(request)
                self.assertEqual(b"HTTP/1.1 200", stalled.recv(12))
                other.sendall(request)
                other.settimeout(30.0)
                self.assertEqual(b"HTTP/1.1 200", other.recv(12))
                self.assertLess(world.check().rss - before.rss, 64 * MB)


class DescriptorTest(unittest.TestCase):
    def limit_after(self, soft, hard, connections):
        """The soft limit after descriptors.allow() in a process that began with these."""
        code = (
            "import resource, sys; sys.path.insert(0, sys.argv[1]); from portway import descriptors\n"
            f"resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))\n"
            f"descriptors.allow({connections}); print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
        )
        done = subprocess.run([sys.executable, "-c", code, str(ROOT)], capture_output=True, text=True, check=True)
        return int(done.stdout)

    def test_the_limit_is_raised(self):
        """To what max_connections needs, else as far as it may; never lowered."""
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        if hard != resource.RLIM_INFINITY and hard < 4000:
            self.skipTest(f"only {hard} descriptors are allowed here")
        self.assertEqual(1000 + 512, self.limit_after(256, 4000, 1000))
        self.assertEqual(2000, self.limit_after(256, 2000, 12_000))
        self.assertEqual(3000, self.limit_after(3000, 4000, 1000))

    @unittest.skipUnless(HAS_PROC, "needs prlimit")
    def test_the_daemon_raises_its_own(self):
        """Started where 256 are usual, it can hold as many clients as it is configured to."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if hard != resource.RLIM_INFINITY and hard < 2000:
            self.skipTest(f"only {hard} descriptors are allowed here")
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        try:
            world = self.enterContext(Attacked("max_connections = 1000"))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        self.assertEqual(1000 + 512, resource.prlimit(world.daemon.pid, resource.RLIMIT_NOFILE)[0])


@unittest.skipUnless(HAS_PROC, "needs prlimit")
class FewDescriptorsTest(AttackCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        resource.prlimit(cls.world.daemon.pid, resource.RLIMIT_NOFILE, (128, 128))

    def test_more_clients_than_descriptors(self):
        """Where they run out, connections that are only idle are closed for the new ones, which are served."""
        idle = [self.enterContext(attacks.connect(self.world.port)) for _ in range(300)]
        self.world.check()
        with Connection(self.world.port) as client:
            self.assertEqual(200, client.ask("GET", "/health").status)
        self.assertEqual(300, len(idle))


if __name__ == "__main__":
    unittest.main()
