"""The command line: `python -m normkern train`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    Commands: TypeAlias = argparse._SubParsersAction[argparse.ArgumentParser]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command, from `argv` or else the process's arguments; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m normkern", description="Fused, measured optimizers for PyTorch, from the command line."
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_train(commands)
    arguments = parser.parse_args(argv)
    status: int = arguments.run(arguments)
    return status


def _add_train(commands: Commands) -> None:
    from . import train

    parser = commands.add_parser(
        "train",
        help="the demo: train a small ResNet on handwritten digits and watch its norms",
        description=(
            "Train a small batch-normalised ResNet on scikit-learn's handwritten digits, print what every epoch "
            "measured, time the step against torch's, and write train.json and curves.png."
        ),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--optimizer", choices=tuple(train.OPTIMIZERS), default="normkern", help="who takes the steps")
    parser.add_argument("--epochs", type=_whole_number(1, 100_000), default=train.EPOCHS, help="passes over the data")
    parser.add_argument("--seed", type=_whole_number(0, 2**63 - 1), default=0, help="of weights, order and shifts")
    parser.add_argument("--out", type=Path, default=Path("demo"), metavar="FOLDER", help="where the results go")
    parser.set_defaults(run=lambda arguments: _train(arguments, parser))


def _train(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from . import train

    # Asked for before the work begins: a missing matplotlib must not cost a training run.
    missing = [package for module, package in train.PACKAGES.items() if not _importable(module)]
    if missing:
        packages = f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'}"
        print(f"{parser.prog}: {packages} not installed: pip install 'normkern[demo]'", file=sys.stderr)
        return 1
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: expected a folder that exists or can be made, got {arguments.out} ({error})")
    train.run(arguments.optimizer, arguments.epochs, arguments.seed, arguments.out)
    return 0


def _importable(module: str) -> bool:
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


def _whole_number(low: int, high: int) -> Callable[[str], int]:
    """What argparse calls to read a whole number from `low` to `high`."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = low - 1
        if not low <= number <= high:
            raise argparse.ArgumentTypeError(f"expected a whole number from {low} to {high}, got {text!r}")
        return number

    return read


if __name__ == "__main__":
    sys.exit(main())
