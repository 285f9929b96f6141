"""Builds the commit before this one, for builds that no budget is known for."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


#: Settings of a build that is the default one, but that the names of functions stay in the binary.
NAMED = ("cmake.build-type=RelWithDebInfo", "cmake.define.CMAKE_CXX_FLAGS_RELWITHDEBINFO=-DNDEBUG")


class NoParent(Exception):
    """There is no commit to compare with; the text says why."""


def git(*arguments: str, root: Path = ROOT) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise NoParent(f"git {arguments[0]}: {done.stderr.strip()}")
    return done.stdout.strip()


def commit(root: Path = ROOT) -> str:
    """Return the commit before what is here: HEAD where files have changed since, else the one before HEAD.

    Raises:
        NoParent: this is no clone, or a shallow one.
    """
    if not (root / ".git").exists():
        raise NoParent(f"expected a clone of the repository, got {root} without .git")
    if git("status", "--porcelain", "--untracked-files=no", root=root):
        return git("rev-parse", "HEAD", root=root)
    try:
        return git("rev-parse", "--verify", "--quiet", "HEAD^", root=root)
    except NoParent:
        if git("rev-parse", "--is-shallow-repository", root=root) == "true":
            raise NoParent("this clone is shallow and ends at HEAD; git fetch --deepen=1 gets its parent") from None
        raise NoParent("HEAD is the first commit") from None


@contextlib.contextmanager
def built(revision: str, named: bool, root: Path = ROOT) -> Iterator[Path]:
    """Give a folder with the package of a commit, built with the compiler that is here; it is removed at the end.

    named: whether its binary keeps the names of functions, as the one does that it is compared with.

    Raises:
        RuntimeError: the build failed.
    """
    settings = NAMED if named else ()
    with tempfile.TemporaryDirectory() as name:
        tree, into = Path(name) / "tree", Path(name) / "package"
        git("worktree", "add", "--quiet", "--detach", str(tree), revision, root=root)
        try:
            done = subprocess.run(
                [
                    sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(into),
                    *(f"--config-settings={setting}" for setting in settings), str(tree),
                ],
                env={**os.environ, "NORMKERN_CUDA": "OFF"}, capture_output=True, text=True, check=False,
            )  # fmt: skip
            if done.returncode:
                raise RuntimeError(f"building {revision} failed:\n{done.stdout}{done.stderr}")
            yield into
        finally:
            git("worktree", "remove", "--force", str(tree), root=root)
