"""Processes in which Triton's kernels are not interpreted, so that they are compiled for GPUs where there is none."""

import os
import subprocess
import sys

SHARED = 101_376  # bytes of shared memory of one program on consumer GPUs


def printed(code, *arguments):
    """What a program prints: its lines, in words."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return [line.split() for line in done.stdout.splitlines()]
