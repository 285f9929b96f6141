"""All four papers and one report: ``make papers``."""

from . import auto_rate, exponential, intrinsic, svag
from .paper import options, reproduce

if __name__ == "__main__":
    reproduce([m.PAPER for m in (auto_rate, exponential, intrinsic, svag)], options("The four papers, reproduced."))
