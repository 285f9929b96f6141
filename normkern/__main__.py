"""The command line: `python -m normkern info | doctor | train | advise`."""

from __future__ import annotations

import argparse
import importlib
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import normkern

if TYPE_CHECKING:
    Commands: TypeAlias = argparse._SubParsersAction[argparse.ArgumentParser]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command, from `argv` or else the process's arguments; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m normkern", description="Fused SGD for PyTorch that also returns the norms of every step."
    )
    parser.add_argument("--version", action="version", version=f"normkern {normkern.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_info(commands)
    _add_doctor(commands)
    _add_train(commands)
    _add_advise(commands)
    arguments = parser.parse_args(argv)
    try:
        status: int = arguments.run(arguments)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `python -m normkern doctor | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 141
    return status


def _add_info(commands: Commands) -> None:
    parser = commands.add_parser(
        "info",
        help="print what was built and what it runs on",
        description=(
            "Print versions, the binary and the libraries it needs, instruction-set levels, threads, OpenMP runtimes "
            "and GPUs."
        ),
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_info)


def _info(arguments: argparse.Namespace) -> int:
    from .doctor import info

    info.show(arguments.json)
    return 0


def _add_doctor(commands: Commands) -> None:
    parser = commands.add_parser(
        "doctor",
        help="check that normkern works correctly on this machine",
        description=(
            "Compare every op on every instruction-set level and dtype with the reference; check threads, OpenMP "
            "runtimes, versions and devices; print what to do about each failure. The exit status is 1 if a check "
            "failed."
        ),
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="print a line for every check")
    parser.add_argument("--json", action="store_true", help="print JSON: every check, and what info prints")
    parser.add_argument(
        "--import",
        dest="modules",
        action="extend",
        nargs="+",
        default=[],
        metavar="MODULE",
        help="import these modules first, as your program does: one may load a second OpenMP runtime",
    )
    parser.set_defaults(run=lambda arguments: _doctor(arguments, parser))


def _doctor(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from . import doctor

    try:
        brought_by = doctor.import_modules(arguments.modules)
    except ImportError as error:
        parser.error(f"argument --import: {error}")
    return 0 if doctor.show(brought_by, arguments.json, arguments.verbose) else 1


def _add_train(commands: Commands) -> None:
    from .demo import settings

    parser = commands.add_parser(
        "train",
        help="run the demo: train a small ResNet on handwritten digits and measure its norms",
        description=(
            "Train a small batch-normalised ResNet on scikit-learn's handwritten digits, print the measurements of "
            "every epoch, time the step against torch's, and write train.json and curves.png."
        ),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--optimizer",
        choices=(*settings.OPTIMIZERS, "svag"),
        default=settings.Settings.optimizer,
        help="the optimizer: normkern's SGD or AdamW, one of torch's implementations of them, or normkern's SVAG",
    )
    parser.add_argument(
        "--lr",
        type=_positive_number,
        default=argparse.SUPPRESS,
        help=f"the learning rate at the start (default: {settings.LR:g}; of AdamW {settings.ADAMW_LR:g})",
    )
    parser.add_argument(
        "--l",
        type=_number_of_at_least_a_half,
        default=argparse.SUPPRESS,
        help=f"only with --optimizer svag: take l times as many steps of 1/l the size (default: {settings.SVAG_L:g})",
    )
    parser.add_argument(
        "--decay",
        choices=("coupled", "exponential"),
        default=settings.Settings.decay,
        help="the form of the weight decay: in every step, or as an exponentially growing learning rate",
    )
    parser.add_argument(
        "--noise-every",
        type=_whole_number(1, 1_000_000),
        default=argparse.SUPPRESS,
        metavar="STEPS",
        help="measure the noise of the samples' gradients, in eval mode, every so many steps (svag measures its own)",
    )
    _add_run(parser, settings.EPOCHS, "passes over the data; with svag 2 l times as many")
    parser.set_defaults(run=lambda arguments: _train(arguments, parser))


def _add_run(parser: argparse.ArgumentParser, epochs: int, passes: str) -> None:
    """Add the options of every command that trains the demo's network."""
    from .demo import settings

    parser.add_argument("--epochs", type=_whole_number(1, 100_000), default=epochs, help=passes)
    parser.add_argument(
        "--seed", type=_whole_number(0, 2**63 - 1), default=0, help="the seed of weights, order and shifts of images"
    )
    parser.add_argument(
        "--device",
        type=_device,
        default=argparse.SUPPRESS,
        help="where to train: cpu, cuda or cuda:1 (default: the first GPU that torch sees, or else the CPU)",
    )
    parser.add_argument(
        "--out", type=Path, default=settings.Settings.out, metavar="FOLDER", help="the folder for the results"
    )


def _train(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from .demo import settings

    chosen = f"got --optimizer {arguments.optimizer}"
    if "l" in arguments and arguments.optimizer != "svag":
        parser.error(f"argument --l: expected only with --optimizer svag, {chosen}")
    if arguments.decay == "exponential" and arguments.optimizer not in settings.EXPONENTIAL:
        takers = " or ".join(settings.EXPONENTIAL)
        parser.error(f"argument --decay: exponential expected --optimizer {takers}, {chosen}")
    if "noise_every" in arguments and arguments.optimizer == "svag":
        parser.error(
            "argument --noise-every: expected an --optimizer other than svag, which measures the noise itself, "
            f"{chosen}"
        )
    if not _is_ready(arguments, parser):
        return 1
    from .demo import training

    options = {name: value for name, value in vars(arguments).items() if name != "run"}
    return _finished(lambda: training.run(settings.Settings(**options)), parser)


def _add_advise(commands: Commands) -> None:
    from .demo import settings

    parser = commands.add_parser(
        "advise",
        help="run the demo for a short time and print advice on batch size and learning rate from its noise",
        description=(
            "Train the demo's network at a constant learning rate, measure the gradient noise with pairs of batches, "
            "print what normkern.advise makes of it, and write advise.json and advise.png."
        ),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--lr", type=_positive_number, default=settings.LR, help="the learning rate at the start")
    _add_run(parser, settings.ADVISE_EPOCHS, "as many steps as in so many passes over the data; each takes two batches")
    parser.set_defaults(run=lambda arguments: _advise(arguments, parser))


def _advise(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    if not _is_ready(arguments, parser):
        return 1
    from .demo import advice

    options = {"device": None, **{name: value for name, value in vars(arguments).items() if name != "run"}}
    return _finished(lambda: advice.run(**options), parser)


def _is_ready(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> bool:
    """Check packages and the output folder before the work begins: what is missing must not cost a training run."""
    from .demo import settings

    if _lacks(settings.PACKAGES, parser):
        return False
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: expected a folder that exists or can be made, got {arguments.out} ({error})")
    return True


def _finished(run: Callable[[], None], parser: argparse.ArgumentParser) -> int:
    """Run a training; return the exit status."""
    from .demo.training import Diverged

    try:
        run()
    except Diverged as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    return 0


def _lacks(packages: Mapping[str, str], parser: argparse.ArgumentParser) -> bool:
    """Return whether any of `packages` (module -> package) cannot be imported; print how to install them."""
    missing = [package for module, package in packages.items() if not _importable(module)]
    if missing:
        names = f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'}"
        print(f"{parser.prog}: {names} not installed: pip install {' '.join(missing)}", file=sys.stderr)
    return bool(missing)


def _importable(module: str) -> bool:
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


def _whole_number(low: int, high: int) -> Callable[[str], int]:
    """Return what argparse calls to read a whole number from `low` to `high`."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = low - 1
        if not low <= number <= high:
            raise argparse.ArgumentTypeError(f"expected a whole number from {low} to {high}, got {text!r}")
        return number

    return read


def _positive_number(text: str) -> float:
    """Read a learning rate, for argparse."""
    number = _number(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return number


def _number_of_at_least_a_half(text: str) -> float:
    """Read SVAG's l, for argparse."""
    number = _number(text)
    if not 0.5 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1/2, got {text!r}")
    return number


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _device(text: str) -> str:
    """Read the device to train on, for argparse."""
    import torch

    expected = "expected cpu or a GPU that torch sees, cuda or cuda:<index>"
    try:
        device = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{expected}, got {text!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{expected}, got {text!r}")
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= count:
        raise argparse.ArgumentTypeError(f"{expected}, got {text!r}, and torch sees {count} GPU{'s' * (count != 1)}")
    return text


if __name__ == "__main__":
    sys.exit(main())
