"""Jobs on a cluster: how one is submitted, and what its files tell about it.

In: options of a cluster and of a job; the files that a run keeps on disk. Out: a batch script or a
command, and a `RunStatus`. Only check.py imports torch, so that `launch.status` answers at once.
"""
