"""What a service manager is told of Portway: a LaunchAgent for launchd, a user unit for systemd.

Text from values, and back: nothing here runs a program or writes a file. Absolute paths only, since neither
manager knows a shell's PATH or folder, and never a key: what they hold can be read by other programs.
"""

from __future__ import annotations

import plistlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

LABEL = "io.github.portway"  # launchd's name for it; the file is called so, too
UNIT = "portway.service"  # systemd's
GRACE = 10  # seconds beyond server.drain before the manager kills what is still there
USAGE, BAD_CONFIG = 2, 78  # exit codes that another start would not mend

# launchd.plist(5), as far as it is used here; a test holds the agent against it
AGENT_KEYS: Mapping[str, type] = {
    "Label": str,
    "ProgramArguments": list,
    "EnvironmentVariables": dict,
    "RunAtLoad": bool,
    "KeepAlive": dict,
    "ThrottleInterval": int,
    "ExitTimeOut": int,
    "ProcessType": str,
    "StandardOutPath": str,
    "StandardErrorPath": str,
    "Umask": int,
    "WorkingDirectory": str,
}


class BadUnit(Exception):
    """A unit that can't be written down. str() says why."""


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be run. Paths are absolute.

    config: "" = found by `portway serve` itself. environment: where the user's folders are, if not in the
    usual places. env_file: NAME=value lines with keys, read by systemd if it is there. drain: seconds.
    """

    python: str
    program: str  # portway.pyz
    home: str
    log: str  # launchd writes what the daemon says there; systemd has its journal
    config: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    env_file: str = ""
    drain: float = 30.0

    @property
    def command(self) -> list[str]:
        """-I and -S: no variable, no current folder and no site-packages get into the daemon."""
        command = [self.python, "-I", "-S", self.program, "serve"]
        return [*command, "--config", self.config] if self.config else command


def agent(job: Job) -> bytes:
    """The LaunchAgent. Raises BadUnit."""
    _check(job)
    values = {
        "Label": LABEL,
        "ProgramArguments": job.command,
        "EnvironmentVariables": dict(job.environment),
        "RunAtLoad": True,
        "KeepAlive": {"SuccessfulExit": False},  # again if it failed; stopped by SIGTERM it exits with 0
        "ThrottleInterval": 10,  # seconds between two starts
        "ExitTimeOut": int(job.drain) + GRACE,  # launchd's own 20 s are less than server.drain
        "ProcessType": "Interactive",  # anything else has its CPU and I/O throttled, and somebody waits for an answer
        "StandardOutPath": job.log,
        "StandardErrorPath": job.log,
        "Umask": 0o077,
        "WorkingDirectory": job.home,
    }
    if not job.environment:
        del values["EnvironmentVariables"]
    return plistlib.dumps(values, sort_keys=False)


def unit(job: Job) -> bytes:
    """The systemd user unit. Raises BadUnit."""
    _check(job)
    lines = [
        "[Unit]",
        "Description=Portway, one OpenAI API for the models on this machine",
        "Documentation=https://github.com/portway/portway",
        "StartLimitIntervalSec=120",
        "StartLimitBurst=5",
        "",
        "[Service]",
        "Type=exec",
        f"ExecStart={' '.join(map(_quoted, job.command))}",
        "ExecReload=/bin/kill -HUP $MAINPID",
        f"WorkingDirectory={_escaped(job.home)}",
        *(f"Environment={_quoted(f'{name}={value}', expanded='%')}" for name, value in sorted(job.environment.items())),
        *([f"EnvironmentFile=-{_escaped(job.env_file)}"] if job.env_file else []),
        "Restart=on-failure",
        "RestartSec=2",
        f"RestartPreventExitStatus={USAGE} {BAD_CONFIG}",
        f"TimeoutStopSec={int(job.drain) + GRACE}",
        "UMask=0077",
        "NoNewPrivileges=yes",
        "LockPersonality=yes",
        "RestrictRealtime=yes",
        "RestrictSUIDSGID=yes",
        "SystemCallArchitectures=native",
        "",
        "[Install]",
        "WantedBy=default.target",
        "",
    ]
    return "\n".join(lines).encode()


def _check(job: Job) -> None:
    for text in (*job.command, job.home, job.log, job.env_file, *job.environment.values()):
        if not text.isprintable():
            raise BadUnit(f"{text!a} holds a character that can't stand in a unit")
    for path in (job.python, job.program, job.home, job.log):
        if not path.startswith("/"):
            raise BadUnit(f"{path!r} is not an absolute path")


def _quoted(word: str, expanded: str = "%$") -> str:
    """One word as systemd reads it: quoted, and what it would expand doubled ($ only in a command line)."""
    word = word.replace("\\", "\\\\").replace('"', '\\"')
    for char in expanded:
        word = word.replace(char, char * 2)
    return word if re.fullmatch(r"[A-Za-z0-9_./:=@%$+,-]+", word) else f'"{word}"'


def unquoted(word: str) -> str:
    """The word that _quoted wrote, without its quotes."""
    return re.sub(r"\\(.)", r"\1", word.replace("%%", "%").replace("$$", "$"))


def _escaped(path: str) -> str:
    """A path as systemd reads it where it is all there is on the line."""
    return path.replace("%", "%%")


# --- what the managers say -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class State:
    """What a manager says of the service. last: how the run before ended, "" if it doesn't say."""

    loaded: bool
    running: bool = False
    pid: int = 0
    last: str = ""
    restarts: int | None = None


def read_launchctl(code: int, output: str) -> State:
    """What `launchctl print gui/UID/LABEL` says. Only the lines one tab in are the job's own."""
    if code != 0:
        return State(loaded=False)
    values = dict(re.findall(r"^(?:\t| {1,8})([a-z][a-z ]*[a-z]) = ([^{\n]+?)\s*$", output, re.MULTILINE)[::-1])
    pid = values.get("pid", "")
    signal, exit_code = values.get("last terminating signal", ""), values.get("last exit code", "")
    last = f"killed: {signal}" if signal else exit_code
    if last in ("0", "(never exited)"):
        last = ""
    runs = values.get("runs", "")
    return State(
        loaded=True,
        running=values.get("state") == "running",
        pid=int(pid) if pid.isdigit() else 0,
        last=last if signal or not last else f"exit code {last}",
        restarts=int(runs) - 1 if runs.isdigit() and int(runs) else None,
    )


def read_systemctl(output: str) -> State:
    """What `systemctl --user show` says of the properties in SHOWN."""
    values = dict(line.split("=", 1) for line in output.splitlines() if "=" in line)
    pid, restarts = values.get("MainPID", "0"), values.get("NRestarts", "")
    result, status = values.get("Result", "success"), values.get("ExecMainStatus", "0")
    return State(
        loaded=values.get("LoadState") == "loaded",
        running=values.get("ActiveState") == "active",
        pid=int(pid) if pid.isdigit() else 0,
        last="" if result == "success" else f"{result}, status {status}",
        restarts=int(restarts) if restarts.isdigit() else None,
    )


SHOWN: Sequence[str] = ("LoadState", "ActiveState", "SubState", "MainPID", "NRestarts", "Result", "ExecMainStatus")
