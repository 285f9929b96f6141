"""The command line: `python -m normkern info | doctor | train`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
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
    _add_info(commands)
    _add_doctor(commands)
    _add_train(commands)
    arguments = parser.parse_args(argv)
    status: int = arguments.run(arguments)
    return status


def _add_info(commands: Commands) -> None:
    parser = commands.add_parser(
        "info",
        help="what was built, and what it runs on",
        description=(
            "Print versions, the binary and the libraries it needs, instruction-set levels, threads, OpenMP runtimes "
            "and GPUs."
        ),
    )
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.set_defaults(run=lambda arguments: _info(arguments, parser))


def _info(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    if not arguments.json and _lacks(_TABLES, parser):
        return 1
    from .doctor import info

    info.show(arguments.json)
    return 0


def _add_doctor(commands: Commands) -> None:
    parser = commands.add_parser(
        "doctor",
        help="is it right on this machine: a line per check, a cure per failure",
        description=(
            "Compare every op on every instruction-set level and dtype with the reference, here and now; look at "
            "threads, OpenMP runtimes, versions and devices. The exit status is 1 if something failed."
        ),
    )
    parser.add_argument("--json", action="store_true", help="as JSON, with what info prints")
    parser.add_argument(
        "--import",
        dest="modules",
        action="extend",
        nargs="+",
        default=[],
        metavar="MODULE",
        help="import these first, as your program does: they may bring a second OpenMP runtime",
    )
    parser.set_defaults(run=lambda arguments: _doctor(arguments, parser))


def _doctor(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    if not arguments.json and _lacks(_TABLES, parser):
        return 1
    from . import doctor

    try:
        brought_by = doctor.import_modules(arguments.modules)
    except ImportError as error:
        parser.error(f"argument --import: {error}")
    return 0 if doctor.show(brought_by, arguments.json) else 1


def _add_train(commands: Commands) -> None:
    from .demo import training as train

    parser = commands.add_parser(
        "train",
        help="the demo: train a small ResNet on handwritten digits and watch its norms",
        description=(
            "Train a small batch-normalised ResNet on scikit-learn's handwritten digits, print what every epoch "
            "measured, time the step against torch's, and write train.json and curves.png."
        ),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    choices = (*train.OPTIMIZERS, "svag")
    parser.add_argument("--optimizer", choices=choices, default="normkern", help="who takes the steps")
    parser.add_argument(
        "--l",
        type=_number_of_at_least_a_half,
        default=argparse.SUPPRESS,
        help=f"of --optimizer svag alone: l times as many steps of 1/l the size (default: {train.SVAG_L:g})",
    )
    parser.add_argument(
        "--decay",
        choices=("coupled", "exponential"),
        default="coupled",
        help="the same weight decay in another form: as an exponentially growing learning rate",
    )
    parser.add_argument(
        "--noise-every",
        type=_whole_number(1, 1_000_000),
        default=argparse.SUPPRESS,
        metavar="STEPS",
        help="measure the noise of the samples' gradients, in eval mode, every so many steps (svag: of its own accord)",
    )
    parser.add_argument(
        "--epochs",
        type=_whole_number(1, 100_000),
        default=train.EPOCHS,
        help="passes over the data; of svag 2 l as many",
    )
    parser.add_argument("--seed", type=_whole_number(0, 2**63 - 1), default=0, help="of weights, order and shifts")
    parser.add_argument("--out", type=Path, default=Path("demo"), metavar="FOLDER", help="where the results go")
    parser.set_defaults(run=lambda arguments: _train(arguments, parser))


def _train(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from .demo import training as train

    if "l" in arguments and arguments.optimizer != "svag":
        parser.error(f"argument --l: expected only with --optimizer svag, got --optimizer {arguments.optimizer}")
    if arguments.decay == "exponential" and arguments.optimizer not in train.EXPONENTIAL:
        takers = " or ".join(train.EXPONENTIAL)
        parser.error(
            f"argument --decay: exponential expected --optimizer {takers}, got --optimizer {arguments.optimizer}"
        )
    if "noise_every" in arguments and arguments.optimizer == "svag":
        parser.error(
            "argument --noise-every: expected an --optimizer other than svag, which measures the noise itself, "
            "got --optimizer svag"
        )
    # Asked for before the work begins: a missing matplotlib must not cost a training run.
    if _lacks(train.PACKAGES, parser):
        return 1
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: expected a folder that exists or can be made, got {arguments.out} ({error})")
    l = getattr(arguments, "l", train.SVAG_L)
    noise_every = getattr(arguments, "noise_every", None)
    train.run(arguments.optimizer, arguments.epochs, arguments.seed, arguments.out, l, arguments.decay, noise_every)
    return 0


#: What tables need: module -> the package that brings it.
_TABLES = {"rich": "rich"}


def _lacks(packages: Mapping[str, str], parser: argparse.ArgumentParser) -> bool:
    """Whether any of `packages` (module -> package) cannot be imported; says so."""
    missing = [package for module, package in packages.items() if not _importable(module)]
    if missing:
        named = f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'}"
        print(f"{parser.prog}: {named} not installed: pip install 'normkern[demo]'", file=sys.stderr)
    return bool(missing)


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


def _number_of_at_least_a_half(text: str) -> float:
    """What argparse calls to read SVAG's l."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0.5 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number of at least 1/2, got {text!r}")
    return number


if __name__ == "__main__":
    sys.exit(main())
