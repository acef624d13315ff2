"""`layersweep-submit`: a job on a cluster, checked before it is queued.

    python -m launch.submit cluster=slurm cluster.nodes=2 cluster.time=4:00:00 checkpoint=DIR ...
    python -m launch.submit cluster=torchrun checkpoint=DIR output=DIR ...
    python -m launch.submit job=evaluate DIR source=DIR data=FILE

Words that begin with cluster, job=, dry_run=, hydra or - are this command's own; all others are
handed to the job as they are. Why there is a script of our own: see pipeline/cluster/queue.py.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from launch.entry import CONF_DIR, JOBS_DIR, launch, split_positional
from pipeline.cluster.check import check_job
from pipeline.cluster.foreground import command_of, run_here, show
from pipeline.cluster.options import (
    JobName,
    LocalConfig,
    SlurmConfig,
    SubmitConfig,
    TorchrunConfig,
)
from pipeline.cluster.queue import submit
from pipeline.cluster.script import SubmittedJob, render
from pipeline.config import CalibrateConfig, Device, to_dataclass
from pipeline.errors import ConfigError
from pipeline.preparation import Place

# Hydra's flags that take the word that follows.
_WITH_VALUE = {"--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn", "--cfg", "-c"}
_WITH_VALUE |= {"--package", "-p", "--info", "-i"}
REFUSED = 2
_OWN = ("cluster", "job", "dry_run", "hydra")


def main() -> None:
    """Console command."""
    own, job_words = split_words(sys.argv[1:])
    if {"-m", "--multirun"} & set(own):
        problem = ConfigError(
            "--multirun",
            value="several jobs",
            rule="one job is submitted at a time",
            remedy="call layersweep-submit for each",
        )
        sys.stderr.write(f"layersweep: error: {problem}\n")
        sys.exit(REFUSED)
    sys.argv[1:] = own
    store = ConfigStore.instance()
    store.store(name="submit_schema", node=SubmitConfig)
    for name, schema in _SCHEMAS.items():
        store.store(group="cluster", name=f"{name}_schema", node=schema)
    launch("submit", lambda composed, place: _act(composed, place, job_words))


_SCHEMAS = {"slurm": SlurmConfig, "torchrun": TorchrunConfig, "local": LocalConfig}


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Words of this command, and those of the job."""
    own: list[str] = []
    others: list[str] = []
    for index, word in enumerate(words):
        follows = index > 0 and words[index - 1] in _WITH_VALUE
        name = word.lstrip("+~").partition("=")[0]
        is_own = word.startswith("-") or name.split(".")[0].split("/")[0] in _OWN
        (own if follows or (is_own and not Path(word).is_dir()) else others).append(word)
    return own, others


def _act(composed: DictConfig, _place: Place, job_words: Sequence[str]) -> int:
    asked: SubmitConfig = to_dataclass(composed)
    cluster = asked.cluster
    config = compose_job(asked.job, job_words)
    job = SubmittedJob(
        name=asked.job,
        words=tuple(job_words),
        directory=Path.cwd(),
        output=_output(config),
    )
    if isinstance(cluster, SlurmConfig):
        check_job(config, CONF_DIR, cluster.nodes * cluster.ranks if job.has_ranks else 1)
        if asked.dry_run:
            sys.stdout.write(render(job, cluster, sys.executable))
        else:
            sys.stdout.write(submit(job, cluster, sys.executable))
        return 0
    ranks = 1
    if isinstance(cluster, TorchrunConfig):
        ranks = cluster.ranks_per_node or _devices(config)
    check_job(config, CONF_DIR, ranks)
    words = command_of(job, cluster, sys.executable, ranks)
    if asked.dry_run:
        sys.stdout.write(show(words, cluster.environment))
        return 0
    return run_here(job, cluster, words, {**os.environ, **cluster.environment})


def compose_job(name: JobName, words: Sequence[str]) -> Any:
    """The options of a job, as its own command would compose them.

    Raises:
        ConfigError: A word that it would not take.
    """
    directory, overrides = None, list(words)
    if name in (JobName.evaluate, JobName.verify):
        directory, overrides = split_positional(words)
    GlobalHydra.instance().clear()  # of this command, whose own options are composed by now
    try:
        with initialize_config_dir(version_base=None, config_dir=str(JOBS_DIR)):
            config = to_dataclass(compose(name.value, overrides=overrides))
    except (HydraException, OmegaConfBaseException) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"options of the job: {' '.join(overrides)}",
            value=reason,
            rule=f"they are those of layersweep-{name.value}",
            remedy=f"see layersweep-{name.value} --help; options of the cluster are cluster.NAME=",
        ) from error
    return config if directory is None else dataclasses.replace(config, directory=directory)


def _output(config: Any) -> Path | None:
    """The directory that a job makes, if a later start can go on with it."""
    is_kept = type(config) is CalibrateConfig and not config.discards_output
    return Path(os.path.abspath(os.path.expanduser(config.output))) if is_kept else None


def _devices(config: Any) -> int:
    """GPUs of this machine that a job would use; 1 without any."""
    is_cpu = getattr(config, "device", None) is Device.cpu
    return 1 if is_cpu else max(1, torch.cuda.device_count())


if __name__ == "__main__":
    main()
