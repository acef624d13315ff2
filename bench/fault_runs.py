"""Runs of the real command in forked ranks, for the campaign of faults.

In: a scratch directory. Out: attempts of `launch.calibrate` on a few gloo ranks of this machine,
each a fork of this process, which has imported everything: an attempt takes seconds. The ranks go
through the command's own entry point: options, signals, exit statuses and last words are its own.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

import launch.calibrate
from bench.fault_injections import Attempt
from bench.machine import process_state
from launch.entry import CONF_DIR
from pipeline.mcore import slots  # noqa: F401  (imported before forking: once, not per rank)
from pipeline.recipe import load_recipe

RECIPE = "nvfp4_four_over_six"
DEMO = Path(__file__).parents[1] / "pipeline" / "demo" / "model"
SEQUENCES, SEQ_LEN = 8, 64
LAYOUTS: Mapping[str, tuple[str, ...]] = {
    "EP2": ("parallel.ep=2",),
    "TP2": ("parallel.tp=2", "parallel.ep=1"),
    "DP2": ("parallel.ep=1",),
}
FAILURE_S = 6.0
OPTIONS = (
    f"recipe={RECIPE}",
    f"calibration.num_sequences={SEQUENCES}",
    f"calibration.seq_len={SEQ_LEN}",
    "calibration.micro_batch=2",
    "calibration.loss_sequences=2",
    "evaluation.num_sequences=2",
    "evaluation.group_seq_len=32",
    "allow_bad_loss=true",
    "device=cpu",
    "timeout_minutes=2",
    f"failure_seconds={FAILURE_S:g}",
    "stall_minutes=0.5",
    "stop_seconds=10",
    "snapshots.minutes=null",
)
WORLD = 2
_PATIENCE_S = 180.0
_LAUNCHER_S = 6.0  # a launcher's patience, beyond that of the ranks
_REPORTS = ("run.json", "report.html", "metrics.jsonl", "config.yaml")


@dataclass(frozen=True)
class Ended:
    """How an attempt ended.

    Attributes:
        statuses: Of the ranks; negative where a signal ended one.
        seconds: The whole attempt.
        after_s: From the fault to the end of the last rank; None where there was no such moment.
        words: What each rank wrote.
    """

    statuses: list[int]
    seconds: float
    after_s: float | None
    words: list[str]

    @property
    def is_finished(self) -> bool:
        """Whether every rank ended well."""
        return not any(self.statuses)

    def last_words(self) -> str:
        """The last line of every rank."""
        lines = [text.strip().splitlines() for text in self.words]
        return "\n".join(of_rank[-1] for of_rank in lines if of_rank)


def prepare() -> None:
    """Imports what ranks need, Model Optimizer included."""
    torch.set_num_threads(1)
    load_recipe(RECIPE, CONF_DIR / "recipe")


def make_source(directory: Path) -> None:
    """The demo model in four shards with an index."""
    shutil.copytree(DEMO, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = load_file(DEMO / "model.safetensors")
    names, weight_map = sorted(tensors), {}
    for shard in range(4):
        file = f"model-{shard + 1:05d}-of-00004.safetensors"
        part = {name: tensors[name] for name in names[shard::4]}
        save_file(part, directory / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    vocab = json.loads((DEMO / "config.json").read_text())["vocab_size"]
    ids = np.random.default_rng(0).integers(0, vocab, (SEQUENCES + 2, SEQ_LEN))
    np.save(directory.with_name("ids.npy"), ids)


def attempt(
    source: Path, output: Path, options: Sequence[str], fault: Attempt, folder: Path
) -> Ended:
    """Starts the ranks, lets the fault happen, waits until all are gone.

    Args:
        source: The checkpoint; its token ids lie beside it.
        output: The directory to make.
        options: Of the job, beside those that all runs have.
        fault: What happens.
        folder: Takes what the ranks say.
    """
    folder.mkdir(parents=True, exist_ok=True)
    arguments = [
        f"checkpoint={source}",
        f"output={output}",
        f"data={source.with_name('ids.npy')}",
        *OPTIONS,
        *options,
    ]
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    begun = time.monotonic()
    pids = [_fork(rank, port, arguments, fault, folder) for rank in range(WORLD)]
    struck: list[float | None] = [None]
    striker = None
    if fault.outside is not None:
        outside = fault.outside
        striker = threading.Thread(target=lambda: struck.__setitem__(0, outside(pids)))
        striker.start()
    statuses, ended = _await(pids, begun)
    if striker is not None:
        striker.join()
    after = None if struck[0] is None else max(0.0, ended - struck[0])
    words = [(folder / f"{rank}.log").read_text(errors="replace") for rank in range(WORLD)]
    return Ended(statuses, ended - begun, after, words)


def published(directory: Path) -> dict[str, bytes]:
    """Every file of a finished checkpoint but the reports, which hold times."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name not in _REPORTS
    }


def _fork(rank: int, port: int, arguments: list[str], fault: Attempt, folder: Path) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 3
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # with the process that forked it
        os.setsid()
        log = os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        # A test runner has put something else in their place.
        sys.stdout = open(1, "w", closefd=False, buffering=1)  # noqa: SIM115
        sys.stderr = open(2, "w", closefd=False, buffering=1)  # noqa: SIM115
        os.environ.update(
            RANK=str(rank),
            WORLD_SIZE=str(WORLD),
            LOCAL_RANK=str(rank),
            LOCAL_WORLD_SIZE=str(WORLD),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            GLOO_SOCKET_IFNAME="lo",
        )
        sys.argv = ["layersweep-calibrate", *arguments]
        fault.inside(rank)
        launch.calibrate.main()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return 0  # never


def _await(pids: list[int], begun: float) -> tuple[list[int], float]:
    """Statuses of all, and when the last one was gone.

    Ranks that do not end by themselves after another one are told to by SIGTERM, as a launcher
    does (before they are connected they have no other way to know), and killed if they do not.
    """
    statuses: dict[int, int] = {}
    ended, failed, told = begun, None, False
    while len(statuses) < len(pids):
        for pid in pids:
            if pid not in statuses:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    statuses[pid] = os.waitstatus_to_exitcode(status)
                    ended = time.monotonic()
                    if statuses[pid] and failed is None:
                        failed = ended
        left = [pid for pid in pids if pid not in statuses]
        now = time.monotonic()
        if failed is not None and now - failed > FAILURE_S + _LAUNCHER_S and not told:
            told = True
            for pid in left:
                os.kill(pid, signal.SIGTERM)
        is_late = now - begun > _PATIENCE_S or (told and now - failed > 2 * _PATIENCE_S / 3)
        if left and (
            is_late or (len(left) < len(pids) and all(process_state(pid) == "T" for pid in left))
        ):
            for pid in left:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    return [statuses[pid] for pid in pids], ended
