"""A process's resident memory, for benchmarks; needs nothing of reasonalloc."""

import contextlib
import ctypes
import gc
import threading
import time

import psutil

# Freed memory goes back at once, so that resident memory is what is held, not what the allocator keeps for later: a
# page or more is mapped by itself. (With up to 64 KiB in the heap, its gaps were 5 % of what memory.py measures.)
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "4096", "MALLOC_TRIM_THRESHOLD_": "4096", "MALLOC_TOP_PAD_": "0"}


def resident() -> int:
    """Bytes now, without what the C library has got back and keeps."""
    gc.collect()
    with contextlib.suppress(AttributeError):  # other C libraries have no such call
        ctypes.CDLL(None).malloc_trim(0)
    return int(psutil.Process().memory_info().rss)


class Peak:
    """The largest resident memory while the block runs, in ``bytes``, sampled every millisecond."""

    def __enter__(self) -> "Peak":
        self.bytes, self._process, self._running = 0, psutil.Process(), True
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while self._running:
            self.bytes = max(self.bytes, int(self._process.memory_info().rss))
            time.sleep(1e-3)

    def __exit__(self, *_: object) -> None:
        self._running = False
        self._thread.join()
