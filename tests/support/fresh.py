"""Short Python programs, each in a process of its own that begins with torch imported, and nothing else unless asked for.

Importing torch takes most of the time of such a program. Here a server imports it once, and each program is a fork of the
server.
"""

import atexit
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import torch


def python(*arguments, cwd=None, path=(), env=None, flags=(), imported=(), timeout=120):
    """Run ``python *flags *arguments``, as `subprocess.run` does it; return what it has printed, and its exit code.

    Args:
        arguments: ``-c`` and code, or ``-m``, a module and its arguments.
        cwd: the folder in which it runs.
        path: folders to search for modules before all others but `cwd`.
        env: variables of the environment to set, or with None to remove. The server is started before: what reads its
            variables while torch is imported, as OpenMP does, does not see them.
        flags: of the interpreter. With ``-S`` it finds torch and what is installed beside it, and no more.
        imported: modules that it begins with, beside torch.
        timeout: seconds, after which the program is killed (exit code -14).
    """
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder) / name for name in ("stdout", "stderr")]
        job = {"arguments": arguments, "cwd": str(cwd or Path.cwd()), "path": [*map(str, path)], "env": env or {},
               "timeout": timeout, "said": [*map(str, said)]}  # fmt: skip
        server = _server(flags, imported)
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        code = json.loads(server.stdout.readline())
        return subprocess.CompletedProcess([*flags, *arguments], code, *(file.read_text() for file in said))


@functools.cache
def _server(flags, imported):
    alone = {"PYTHONPATH": str(Path(torch.__file__).parent.parent)} if "-S" in flags else {}  # torch and its neighbours
    server = subprocess.Popen(
        [sys.executable, *flags, __file__, *imported], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, **alone},
    )  # fmt: skip
    atexit.register(_end, server)
    return server


def _end(server):
    server.stdin.close()
    server.stdout.close()
    server.wait()


def _serve():
    """Read a job from each line of stdin, fork for it, and print its exit code; return the job in the fork."""
    for name in sys.argv[1:]:
        importlib.import_module(name)
    gc.freeze()  # at its end a fork then need not look at torch's objects, which takes longer than most programs
    for line in sys.stdin:
        job = json.loads(line)
        if not (child := os.fork()):
            return job
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    return None


def _run(job):
    signal.alarm(job["timeout"])
    for number, name in ((0, os.devnull), *enumerate(job["said"], start=1)):
        os.dup2(os.open(name, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT), number)
    for name, value in job["env"].items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})
    os.chdir(job["cwd"])
    how, what, *arguments = job["arguments"]
    sys.path[0:1] = ["" if how == "-c" else job["cwd"], *job["path"]]
    sys.argv = [how, *arguments]
    sys.orig_argv = [sys.executable, how, what, *arguments]
    if how == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})


if __name__ == "__main__" and (_job := _serve()):
    _run(_job)
