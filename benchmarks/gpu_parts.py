"""Runs named cases in processes of their own, so that an error, a crash or a hang costs one case and no more.

After an illegal access a process can use its GPU no longer: the next case then needs another process. A process says in
a file of notes which case it is at and what it found; whoever started it reads them, and goes on after that case. Knows
nothing of GPUs.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Case = tuple[str, Callable[[], Any]]  # a name, and what returns facts worth keeping, or None; raises what is wrong

LOST = 3  # exit status of a process that can use its GPU no longer
STARTING = 90.0  # seconds until a process has listed its cases: imports, and a sanitizer that starts
STOPPING = 3.0  # seconds before its deadline from which on a process begins no other case
ENDING = 10.0  # seconds that a killed process may take to end
POLL = 0.05
LONGEST, LINES = 2000, 30  # characters kept of an error, lines kept of what a process printed


@dataclass(frozen=True, slots=True)
class Part:
    """Cases that are run together.

    seconds    for all of them; what a part leaves goes to the next
    shards     processes at a time, each with its share of the cases
    stall      seconds without a new case after which a process counts as hung
    prefix     of the command that runs them
    required   whether a case that no longer fits is a failure
    """

    name: str
    seconds: float
    shards: int = 1
    stall: float = 20.0
    prefix: tuple[str, ...] = ()
    required: bool = True


def error_of(error: BaseException) -> dict[str, str]:
    """The type, the text and the place of an error."""
    where = "".join(traceback.format_tb(error.__traceback__)[-2:])
    return {"type": type(error).__name__, "text": str(error)[:LONGEST], "where": where[-LONGEST:]}


def write_json(path: Path, content: Any) -> None:
    """Whole or not at all, whenever the process ends."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
    part.replace(path)


# What a process does.


def run_cases(
    cases: Sequence[Case],
    path: Path,
    first: int,
    until: float,
    facts: dict[str, Any] | None = None,
    is_lost: Callable[[], bool] = lambda: False,
) -> int:
    """Runs cases[first:] until `until` on the clock of time.time, with notes in `path`; returns the exit status.

    is_lost   asked after an error: whether every other case in this process would fail too
    """
    notes: dict[str, Any] = {"cases": len(cases), "next": first, "running": None, "results": {}, "failures": {},
                             "facts": facts or {}, "lost": False}  # fmt: skip
    write_json(path, notes)
    for name, run in cases[first:]:
        if time.time() > until - STOPPING:
            break
        notes["running"] = name
        write_json(path, notes)
        try:
            result = run()
            if result is not None:
                notes["results"][name] = result
        except Exception as error:  # noqa: BLE001  whatever is wrong with a case is what the report is for
            notes["failures"][name] = error_of(error)
            notes["lost"] = is_lost()
        notes["running"] = None
        notes["next"] += 1
        if notes["lost"]:
            break
    write_json(path, notes)
    return LOST if notes["lost"] else 0


# What whoever starts the processes does.


def run_parts(parts: Sequence[Part], until: float, command: Sequence[str], folder: Path) -> dict[str, dict[str, Any]]:
    """Runs parts side by side, all their shards at once, until `until`; by name what became of their cases.

    cases      how many there are; `not_run` of them were never begun, or `cut_short` by the deadline
    results    by case the facts that it returned
    failures   by case, or by process, what was wrong
    facts      that hold for all cases of the part
    """
    shards = [_Shard(part, i, until, command, folder) for part in parts for i in range(part.shards)]
    begin = time.time()
    ended: dict[str, float] = {}
    try:
        waiting = shards
        while waiting:
            waiting = [shard for shard in waiting if not shard.is_done()]
            busy = {shard.part.name for shard in waiting}
            for part in parts:
                if part.name not in busy:
                    ended.setdefault(part.name, time.time() - begin)
            time.sleep(POLL if waiting else 0)
    finally:
        for shard in shards:
            shard.kill()
    return {part.name: _joined(part, shards, ended.get(part.name, time.time() - begin)) for part in parts}


def _joined(part: Part, shards: list[_Shard], seconds: float) -> dict[str, Any]:
    own = [shard for shard in shards if shard.part is part]
    joined: dict[str, Any] = {"seconds": round(seconds, 1), "cases": sum(shard.cases for shard in own)}
    joined["not_run"] = joined["cases"] - sum(shard.next for shard in own)
    joined["cut_short"] = [name for shard in own for name in shard.cut_short]
    joined["required"] = part.required
    for name in ("facts", "failures", "results"):
        joined[name] = {key: value for shard in own for key, value in getattr(shard, name).items()}
    return joined


class _Shard:
    """The processes that run one share of a part's cases, one after the other."""

    def __init__(self, part: Part, index: int, until: float, command: Sequence[str], folder: Path) -> None:
        self.part, self.index, self.until = part, index, until
        self.command = [*part.prefix, *command, "--only", part.name, "--shard", f"{index}/{part.shards}",
                        "--until", repr(until)]  # fmt: skip
        self.notes, self.log = (folder / f"{part.name}-{index}.{kind}" for kind in ("json", "log"))
        self.cases = self.next = 0
        self.results: dict[str, Any] = {}
        self.failures: dict[str, Any] = {}
        self.facts: dict[str, Any] = {}
        self.cut_short: list[str] = []
        self._start()

    def _start(self) -> None:
        self.notes.unlink(missing_ok=True)
        command = [*self.command, "--notes", str(self.notes), "--first", str(self.next)]
        self.began = time.time()
        with self.log.open("w", encoding="utf-8") as log:  # a session: what the process starts ends with it
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may hold on to a process whose kernel hangs
                self.process.wait(ENDING)

    def is_done(self) -> bool:
        """Whether nothing is left to do. Ends a process that hangs, and starts another one for the cases after."""
        code, now, why = self.process.poll(), time.time(), ""
        if code is None:
            if now >= self.until:
                why = "out of time"
            elif now - self._moved() > (self.part.stall if self.notes.exists() else STARTING):
                why = f"nothing came of it for {now - self._moved():.0f} s"
            else:
                return False
            self.kill()
        if self._read(code, why) or time.time() >= self.until - STOPPING:
            return True
        self._start()
        return False

    def _moved(self) -> float:
        """When the process began or last wrote."""
        try:
            return max(self.began, self.notes.stat().st_mtime)
        except FileNotFoundError:
            return self.began

    def _read(self, code: int | None, why: str) -> bool:
        """Takes over what a process found; returns whether there is no sense in starting another one."""
        is_late = time.time() >= self.until
        status = why or f"the process ended with {code}"
        first = self.next
        if not self.notes.exists():
            if is_late and self.cases:  # started once more, and too late to begin anything
                return True
            self.failures[f"process {self.index} from case {first}"] = self._of_process(status)
            return True
        notes = json.loads(self.notes.read_text(encoding="utf-8"))
        self.cases, self.next = notes["cases"], notes["next"]
        for name in ("results", "failures", "facts"):
            getattr(self, name).update(notes[name])
        running = notes["running"]
        if running is not None and is_late:
            self.cut_short.append(running)
        elif running is not None:
            self.failures[running] = self._of_process(status)
            self.next += 1
        elif code not in (0, LOST, None):  # as a sanitizer's is that found something
            self.failures[f"process {self.index} from case {first}"] = self._of_process(status)
        return self.next >= self.cases or not (running is not None or notes["lost"])

    def _of_process(self, status: str) -> dict[str, str]:
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return {"type": "process", "text": status, "printed": "\n".join(lines[-LINES:])[-2 * LONGEST :]}
