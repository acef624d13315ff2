"""Tasks that run one after the other, on whichever thread of a pool is free."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

Task = Callable[[], None]


class InOrder:
    """A queue of tasks; it takes a thread of the pool only while it holds any.

    Args:
        pool: Lends the thread.
    """

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self._lock = threading.Lock()
        self._tasks: deque[Task] = deque()
        self._is_running = False

    def submit(self, task: Task) -> None:
        """Queues a task, which must not raise; from any thread."""
        with self._lock:
            self._tasks.append(task)
            if self._is_running:
                return
            self._is_running = True
        self._pool.submit(self._run)

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._tasks:
                    self._is_running = False
                    return
                task = self._tasks.popleft()
            task()
