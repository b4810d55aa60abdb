"""`portway serve`: the daemon as a process, from its log and cache to its signals.

What it serves is proxy.py's matter; what a configuration may hold, config.py's.
"""

from __future__ import annotations

import errno
import gc
import signal
from collections.abc import Mapping
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from portway import descriptors, proxy, stderr
from portway.config import ConfigError, ConfigWatcher
from portway.memory.measured import Notebook
from portway.memory.measured import default_path as notebook_path
from portway.state import open_cache, open_log

if TYPE_CHECKING:
    from portway.config import Config
    from portway.proxy import Daemon

WATCH_CONFIG = 1.0  # seconds between two looks at the configuration file
CLOSE_ASIDE = 2.0  # seconds given to the log's last lines at the end, and to the cache's last answers
YOUNG = 10_000  # objects made before a collection of garbage: a request makes some hundred, and leaves no cycle


def serve(config: Config, *, config_path: str | None, environ: Mapping[str, str]) -> int:
    """Serve until SIGTERM or SIGINT; reload on SIGHUP and when the file has changed. The exit code."""
    descriptors.allow(config.server.max_connections)
    log, cache = open_log(config, environ), open_cache(config, environ)
    try:
        daemon = proxy.Daemon(config, log=log, cache=cache, notebook=Notebook(notebook_path(environ)))
    except OSError as exc:
        stderr.say(_cannot_listen(config.server.host, config.server.port, exc))
        return 1
    for warning in config.warnings:
        stderr.say(f"warning: {warning}")
    events: SimpleQueue[str] = SimpleQueue()  # its put() may be called from a signal handler
    signal.signal(signal.SIGTERM, lambda *_: events.put("stop"))
    signal.signal(signal.SIGINT, lambda *_: events.put("stop"))
    signal.signal(signal.SIGHUP, lambda *_: events.put("reload"))
    daemon.start()
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG, 10, 10)
    stderr.say(f"listening on {daemon.url}/v1, configured by {config.path}")
    _attend(daemon, ConfigWatcher(config_path, environ), events)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one ends it at once
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    daemon.stop()
    for aside in (log, cache):
        if aside:
            aside.close(CLOSE_ASIDE)
    return 0


def _cannot_listen(host: str, port: int, exc: OSError) -> str:
    from portway.commands.holder import describe  # seldom needed

    holder = describe(host, port) if exc.errno == errno.EADDRINUSE else ""
    return f"can't listen on {host}:{port}: {exc.strerror}; stop {holder or 'what does'}, or change server.port"


def _attend(daemon: Daemon, watcher: ConfigWatcher, events: SimpleQueue[str]) -> None:
    """Until "stop": reload when told to and when the file has changed."""
    event = "start"
    while event != "stop":
        try:
            new = watcher.reload() if event else watcher.poll()
            if new is not None and (event != "start" or daemon.serves_other_than(new)):
                daemon.use(new)
                stderr.say(f"configuration reloaded from {new.path}")
        except ConfigError as exc:
            daemon.refuse(str(exc))
        try:
            event = events.get(timeout=WATCH_CONFIG)
        except Empty:
            event = ""
