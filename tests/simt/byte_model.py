"""Bytes that a kernel must move: what the formula reads and writes of each coordinate, and nothing else."""

import re
from dataclasses import dataclass

from .build import CSRC

#: Bytes of a coordinate as it is stored.
STORAGE = {"double": 8, "float": 4, "bf16": 2, "f16": 2}
#: The names that backend.h gives the ways to measure.
MEASURES = ("nothing", "step", "pair")


@dataclass(frozen=True)
class Rule:
    """A struct of formulas.h."""

    name: str
    buffers: int = 0
    reads_buffers: bool = False
    writes_w: bool = True
    counts: bool = False  # steps, one number of each tensor
    has_pairs: bool = True


def rules() -> dict[str, Rule]:
    """Every rule of formulas.h that back ends instantiate, in its order."""
    text = (CSRC / "core" / "formulas.h").read_text()
    listed = re.search(r"using Rules = List<([^>]*)>", text)
    found = {}
    for name in re.findall(r"\w+", listed[1]):
        traits = re.search(rf"struct {name} \{{\s*static constexpr Traits traits = ([^;]*);", text)[1]
        kept = re.search(r"keeping\((\d)\)", traits)
        buffers = int(kept[1]) if kept else 0
        found[name] = Rule(
            name, buffers, buffers > 0 and "first()" not in traits, "only_sums()" not in traits,
            "counting()" in traits, "step()" in traits and "without_pairs()" not in traits,
        )  # fmt: skip
    return found


#: Kernels over samples that read in packs, and how many narrow loads each of those may have beside it: of norm_columns
#: a row's mean and rstd for its g and its x, of embedding the position that says where the next row is.
SAMPLE_KERNELS = {
    "moments_in_packs": ("moments", 0), "norm_columns_in_packs": ("norm_sums, last", 1),
    "norm_rows": ("norm_sums, first", 0), "row_sums": ("row_sums", 0), "embedding_in_packs": ("embedding_moments", 1),
}  # fmt: skip


def bytes_per_coordinate(rule: str, measure: str, storage: str) -> tuple[int, int]:
    """(read, written) of one coordinate: w and g, the rule's state buffers, the first gradient of a pair."""
    r, size = rules()[rule], STORAGE[storage]
    return size * (2 + r.buffers * r.reads_buffers + (measure == "pair")), size * (r.writes_w + r.buffers)
