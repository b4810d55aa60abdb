"""Other proxies in front of the same upstream, each on its own: what of them is installed.

nginx and haproxy do nothing but relay, with one worker, as Portway is one process: the limit of what can be had.
LiteLLM (`litellm` on PATH) and Portkey (`gateway`, of @portkey-ai/gateway) do what Portway is for.
"""

from __future__ import annotations

import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from scripts.benchmark.measure import Goal, Measurement, compare
from scripts.benchmark.native import Ask, Load, LoadFailed, Shape, Target
from scripts.benchmark.scenarios import Effort
from scripts.benchmark.world import PLAIN, START, Process, World, free_port, memory

NGINX = """\
daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log stderr;
events {{ worker_connections 4096; }}
http {{
  access_log off; client_body_temp_path {folder}; proxy_temp_path {folder}; fastcgi_temp_path {folder};
  uwsgi_temp_path {folder}; scgi_temp_path {folder}; keepalive_requests 1000000; client_max_body_size 32m;
  upstream up {{ server 127.0.0.1:{upstream}; keepalive 128; keepalive_requests 1000000; }}
  server {{
    listen 127.0.0.1:{port};
    location / {{ proxy_pass http://up; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off; }}
  }}
}}
"""

HAPROXY = """\
global
  nbthread 1
defaults
  mode http
  timeout connect 5s
  timeout client 60s
  timeout server 60s
frontend in
  bind 127.0.0.1:{port}
  default_backend up
backend up
  http-reuse always
  server up 127.0.0.1:{upstream}
"""

LITELLM = """\
model_list:
  - model_name: {model}
    litellm_params: {{model: openai/{model}, api_base: "http://127.0.0.1:{upstream}/v1", api_key: none}}
general_settings: {{disable_spend_logs: true, dangerously_permit_weak_or_unset_master_key: true}}
litellm_settings: {{telemetry: false}}
"""


@dataclass(frozen=True, slots=True)
class Peer:
    """program: its name on PATH. command: from its path, the folder, its port and the upstream's."""

    program: str
    command: Callable[[str, Path, int, int], list[str]]
    headers: Callable[[int], tuple[str, ...]] = lambda _: ()


def _nginx(program: str, folder: Path, port: int, upstream: int) -> list[str]:
    file = folder / "nginx.conf"
    file.write_text(NGINX.format(folder=folder, port=port, upstream=upstream), encoding="utf-8")
    return [program, "-p", str(folder), "-c", str(file)]


def _haproxy(program: str, folder: Path, port: int, upstream: int) -> list[str]:
    file = folder / "haproxy.cfg"
    file.write_text(HAPROXY.format(port=port, upstream=upstream), encoding="utf-8")
    return [program, "-db", "-f", str(file)]


def _litellm(program: str, folder: Path, port: int, upstream: int) -> list[str]:
    file = folder / "litellm.yaml"
    file.write_text(LITELLM.format(model=PLAIN, upstream=upstream), encoding="utf-8")
    return [program, "--config", str(file), "--host", "127.0.0.1", "--port", str(port), "--num_workers", "1"]


def _portkey(program: str, _folder: Path, port: int, _upstream: int) -> list[str]:
    return [program, f"--port={port}", "--headless"]


def _portkey_headers(upstream: int) -> tuple[str, ...]:
    host = f"x-portkey-custom-host: http://127.0.0.1:{upstream}/v1"
    return ("x-portkey-provider: openai", host, "Authorization: Bearer none")


PEERS: Mapping[str, Peer] = {
    "nginx": Peer("nginx", _nginx),
    "haproxy": Peer("haproxy", _haproxy),
    "LiteLLM": Peer("litellm", _litellm),
    "Portkey": Peer("gateway", _portkey, _portkey_headers),
}


def peers(world: World, effort: Effort) -> Iterator[Measurement]:
    """Direct, Portway and every peer, all in the same rounds."""
    missing: list[str] = []
    with ExitStack() as stack:
        own = stack.enter_context(world.start("peers"))  # as new as the others, for the sake of its memory
        # a model without a cache: none of the others looks into one either
        targets = {"direct": world.direct(PLAIN), "portway": own.target(f"openai-{PLAIN}")}
        pids = {"portway": own.pid}
        for name, peer in PEERS.items():
            program = shutil.which(peer.program)
            if program is None:
                missing.append(f"{name}: not installed")
                continue
            process, target = _start(world, stack, name, peer, program)
            if problem := _answers(world, process, target):
                missing.append(f"{name}: {problem}")
                continue
            targets[name], pids[name] = target, process.pid
        for measurement in _compared(world, effort, targets):
            measurement.problems += missing
            measurement.notes |= {f"{name}_rss_mb": _family_rss(pid) for name, pid in pids.items()}
            if measurement.what == "whole":
                _against_litellm(measurement)
            yield measurement


def _compared(world: World, effort: Effort, targets: Mapping[str, Target]) -> Iterator[Measurement]:
    for connections in (1, 16, 64):
        name = f"peers, plain, 2 KB, {connections} connection{'s' * (connections > 1)}"
        yield compare(world, name, targets, Ask(), Shape(connections, effort.seconds), rounds=effort.rounds)
    shape = Shape(1, effort.seconds)
    yield compare(world, "peers, first chunk", targets, Ask(stream=True), shape, what="first", rounds=effort.rounds)


def _against_litellm(measurement: Measurement) -> None:
    """Eighty times its rate, an eightieth of what it adds, a twelfth of its memory."""
    ours, theirs, base = (measurement.figures.get(name, {}) for name in ("portway", "LiteLLM", "direct"))
    if not theirs.get("answers"):
        return
    added = [each["p50_us"] - base["p50_us"] for each in (theirs, ours)]
    theirs_mb, ours_mb = (measurement.notes.get(f"{name}_rss_mb") for name in ("LiteLLM", "portway"))
    measurement.notes["times_litellm_rate"] = round(ours["rate"] / theirs["rate"], 1)
    if added[1] > 0:
        measurement.notes["litellm_adds_times"] = round(added[0] / added[1], 1)
    if theirs_mb and ours_mb:
        measurement.notes["litellm_takes_times"] = round(theirs_mb / ours_mb, 1)
    limits = {"times_litellm_rate": 80, "litellm_adds_times": 80, "litellm_takes_times": 12}
    measurement.goals = [Goal(f"notes.{name}", limit, at_least=True) for name, limit in limits.items()]


def _start(world: World, stack: ExitStack, name: str, peer: Peer, program: str) -> tuple[Process, Target]:
    folder = world.folder / name
    folder.mkdir()
    port = free_port()
    process = stack.enter_context(Process(peer.command(program, folder, port, world.upstream), folder, name))
    return process, Target(port, PLAIN, headers=peer.headers(world.upstream))


def _answers(world: World, process: Process, target: Target) -> str:
    """Why it does not answer; "" once it does."""
    until = time.monotonic() + START
    problem = f"does not listen after {START:g} s"
    while time.monotonic() < until:
        try:
            process.check()
        except RuntimeError as exc:
            return str(exc)[-300:]
        try:
            socket.create_connection(("127.0.0.1", target.port), 1).close()
            result = Load(world.tools, world.folder, target, Ask(), Shape(count=1, seconds=5)).result()
        except (OSError, LoadFailed):
            time.sleep(0.2)
            continue
        if result["answers"]:
            return ""
        problem = f"does not work: {result['problem']}"
        time.sleep(0.5)
    return problem


def _family_rss(pid: int) -> float | None:
    """MB of a process and its children: nginx has its worker there."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    except OSError:
        return None
    return round(sum(memory(each)["rss_mb"] or 0.0 for each in (pid, *map(int, children))), 1)
