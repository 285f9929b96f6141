"""Starts a script of this folder in several processes, by torchrun."""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def start(script, processes, *arguments):
    """torchrun, running; each process finds tests/ on its path."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.Popen(
        [*command, str(HERE / script), *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )  # fmt: skip


def run(script, processes, *arguments, seconds=180):
    """The exit status, and what all processes have said."""
    job = start(script, processes, *arguments)
    try:
        told, _ = job.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        job.terminate()  # the agent takes its processes along
        told, _ = job.communicate()
        raise AssertionError(f"{script} hangs in {processes} processes:\n{told[-4000:]}") from None
    return job.returncode, told
