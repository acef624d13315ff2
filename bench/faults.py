"""A campaign of faults: whatever happens to a run, nothing wrong is published.

    python -m bench.faults --injections 216 --json faults.jsonl

Runs the whole command on two gloo ranks of this machine (the demo model, evaluation and snapshots
included), lets one fault happen at a random point, and starts the same command again. In the end
the checkpoint must have the bytes of an undisturbed run; on the way nothing else may be published,
and what is refused must be refused with the right cause. Results go to a file line by line;
started again, the campaign goes on after the last line. Prints a Markdown table at the end.
Mounting a small file system needs root; without it that kind fills nothing and is left out.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench import fault_runs
from bench.fault_injections import (
    FAULT,
    KILLED,
    KINDS,
    REFUSED,
    STOPPED,
    Attempt,
    Injection,
    Scene,
)
from bench.fault_runs import LAYOUTS, WORLD, Ended

_MOUNT_MIB = 64
_MOST_ATTEMPTS = 5
# Ranks that are not connected yet cannot tell each other what happened: the launcher does.
_BEFORE_IT_BEGAN = Attempt(statuses=frozenset({REFUSED, FAULT, STOPPED, KILLED, -signal.SIGTERM}))


def main() -> None:
    """Runs what is missing of the campaign and prints the table; status 1 where a run was wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--injections", type=int, default=216)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), help="names; all by default")
    parser.add_argument("--json", type=Path, required=True, help="results, one line each")
    options = parser.parse_args()
    rows = read_rows(options.json)
    fault_runs.prepare()
    with tempfile.TemporaryDirectory(prefix="layersweep-faults-") as scratch:
        campaign = Campaign(Path(scratch), options.seed)
        for number in range(options.injections):
            if number in rows:
                continue
            kind = options.kinds[number % len(options.kinds)]
            rows[number] = campaign.inject(number, kind)
            with options.json.open("a", encoding="utf-8") as file:
                file.write(json.dumps(rows[number]) + "\n")
            print(_line(rows[number]), flush=True)
    print(table(list(rows.values())))
    sys.exit(any(row["wrong"] for row in rows.values()))


def read_rows(path: Path) -> dict[int, dict[str, Any]]:
    """The results of an earlier part of the campaign, by number."""
    if not path.is_file():
        return {}
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    return {row["number"]: row for row in rows}


class Campaign:
    """Undisturbed runs to compare with, and injections.

    Args:
        scratch: Takes everything.
        seed: Of all random choices.
    """

    def __init__(self, scratch: Path, seed: int) -> None:
        self._scratch, self._seed = scratch, seed
        self._source = scratch / "source" / "model"
        self._source.parent.mkdir(parents=True)
        fault_runs.make_source(self._source)
        self._references: dict[str, tuple[dict[str, bytes], float]] = {}

    def inject(self, number: int, kind: str) -> dict[str, Any]:
        """One fault, and attempts until the run has finished; what came of it as plain values."""
        drawn = random.Random(f"{self._seed} {number}")
        layout = drawn.choice(sorted(LAYOUTS))
        expected, seconds = self._reference(layout)
        folder = self._scratch / f"{number:05d}"
        source = folder / "model"
        shutil.copytree(self._source, source)
        shutil.copy(self._source.with_name("ids.npy"), source.with_name("ids.npy"))
        with _file_system(folder / "out", small=kind == "file system full") as root:
            output = root / "made"
            work = output.with_name("made.partial")
            scene = Scene(drawn, WORLD, seconds, source, work, root)
            injection = KINDS[kind](scene)
            row = self._run(injection, layout, source, output, folder, expected)
        shutil.rmtree(folder, ignore_errors=True)
        return {"number": number, "kind": kind, "layout": layout, **row}

    def _run(
        self,
        injection: Injection,
        layout: str,
        source: Path,
        output: Path,
        folder: Path,
        expected: dict[str, bytes],
    ) -> dict[str, Any]:
        wrong: list[str] = []
        attempts: list[dict[str, Any]] = []
        options = ["snapshots.layers=2", *LAYOUTS[layout], *injection.options]
        for turn in range(_MOST_ATTEMPTS):
            is_struck = turn < len(injection.attempts)
            fault = injection.attempts[turn] if is_struck else Attempt()
            attempts_file = output.with_name(output.name + ".partial") / "attempts.jsonl"
            before = _begun(attempts_file)
            ended = fault_runs.attempt(source, output, options, fault, folder / f"{turn}")
            has_begun = _begun(attempts_file) > before or output.exists()
            if not has_begun and fault.outside is not None and not ended.is_finished:
                fault = _BEFORE_IT_BEGAN
            wrong += _faults_of(ended, fault, output, expected)
            attempts.append(
                {
                    "statuses": ended.statuses,
                    "seconds": round(ended.seconds, 2),
                    "after_s": None if ended.after_s is None else round(ended.after_s, 2),
                    "words": "" if ended.is_finished else ended.last_words()[-600:],
                }
            )
            if ended.is_finished or wrong:
                break
            if turn < len(injection.between):
                injection.between[turn]()
        else:
            wrong.append(f"not finished after {_MOST_ATTEMPTS} attempts")
        if not wrong and output.with_name(output.name + ".partial").exists():
            wrong.append("a work directory beside the finished checkpoint")
        return {"attempts": attempts, "wrong": wrong}

    def _reference(self, layout: str) -> tuple[dict[str, bytes], float]:
        """What an undisturbed run of a layout publishes, and the seconds that it takes."""
        if layout not in self._references:
            output = self._scratch / f"undisturbed-{layout}"
            options = ["snapshots.layers=2", *LAYOUTS[layout]]
            ended = fault_runs.attempt(
                self._source, output, options, Attempt(), self._scratch / f"log-{layout}"
            )
            if not ended.is_finished:
                raise RuntimeError("an undisturbed run failed:\n" + "\n".join(ended.words))
            self._references[layout] = fault_runs.published(output), ended.seconds
        return self._references[layout]


def _begun(attempts: Path) -> int:
    """Attempts that a run says have begun."""
    return attempts.read_text().count('"began"') if attempts.is_file() else 0


def _faults_of(ended: Ended, fault: Attempt, output: Path, expected: dict[str, bytes]) -> list[str]:
    """What is wrong with the end of an attempt."""
    wrong = []
    if not set(ended.statuses) <= set(fault.statuses):
        wrong.append(f"exit statuses {ended.statuses}: {ended.last_words()[-600:]}")
    if ended.is_finished:
        wrong += _differences(output, expected)
    elif output.exists():
        # The last rename was done, and then the run was struck.
        wrong += _differences(output, expected)
    elif fault.named and not re.search(fault.named, "\n".join(ended.words), re.DOTALL):
        wrong.append(f"nobody says {fault.named!r}: {ended.last_words()[-600:]}")
    return wrong


def _differences(output: Path, expected: dict[str, bytes]) -> list[str]:
    if not output.is_dir():
        return ["finished, and nothing is published"]
    found = fault_runs.published(output)
    other = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
    return [f"other bytes are published: {other[:5]}"] if other else []


@contextmanager
def _file_system(directory: Path, *, small: bool) -> Iterator[Path]:
    """A directory; where asked for, on a small file system of its own."""
    directory.mkdir(parents=True)
    if not small:
        yield directory
        return
    size = f"size={_MOUNT_MIB}m"
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", directory], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", "-l", directory], check=True)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: by kind, how many runs there were, how they went on, how soon they ended."""
    by_kind = collections.defaultdict(list)
    for row in rows:
        by_kind[row["kind"]].append(row)
    lines = [
        "| fault | runs | struck after their end | went on, same bytes | wrong "
        "| seconds from fault to exit: median, longest |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for kind in (*(kind for kind in KINDS if kind in by_kind), None):
        chosen = list(rows) if kind is None else by_kind[kind]
        first_try = sum(len(row["attempts"]) == 1 and not row["wrong"] for row in chosen)
        wrong = sum(bool(row["wrong"]) for row in chosen)
        after = [
            attempt["after_s"]
            for row in chosen
            for attempt in row["attempts"]
            if attempt["after_s"] is not None and any(attempt["statuses"])
        ]
        times = f"{statistics.median(after):.1f}, {max(after):.1f}" if after else "-"
        lines.append(
            f"| {kind or '**all**'} | {len(chosen)} | {first_try} "
            f"| {len(chosen) - first_try - wrong} | {wrong} | {times} |"
        )
    return "\n".join(lines)


def _line(row: dict[str, Any]) -> str:
    ends = "; ".join(
        f"{attempt['statuses']} {attempt['seconds']:.1f} s"
        + ("" if attempt["after_s"] is None else f" ({attempt['after_s']:.1f} s after)")
        for attempt in row["attempts"]
    )
    verdict = "WRONG " + " | ".join(row["wrong"]) if row["wrong"] else "right"
    clock = time.strftime("%H:%M:%S")
    return f"{clock} {row['number']:4d} {row['kind']}, {row['layout']}: {ends}: {verdict}"


if __name__ == "__main__":
    main()
