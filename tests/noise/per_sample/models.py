"""All nets, by name."""

from .case import Case
from .nets_attention import ATTENTION
from .nets_conv import CONV
from .nets_dense import DENSE
from .nets_norm import NORM
from .nets_operations import OPERATIONS
from .nets_placed import PLACED
from .nets_published import PUBLISHED
from .nets_recurrent import RECURRENT
from .nets_rows import ROWS
from .nets_shared import SHARED
from .nets_tokens import TOKENS
from .nets_traps import TRAPS
from .refused import COUPLED, MIXED, UNCOVERED

#: Each sample has a gradient, and its statistics must come out exactly (or, where the case allows it, an error).
SEPARABLE: dict[str, Case] = {
    **DENSE,
    **CONV,
    **NORM,
    **TOKENS,
    **ATTENTION,
    **SHARED,
    **TRAPS,
    **OPERATIONS,
    **PUBLISHED,
    **RECURRENT,
    **ROWS,
    **PLACED,
}
#: With a gradient per sample, in all: what a sum over samples must be equal to.
ALL: dict[str, Case] = {**SEPARABLE, **UNCOVERED}

#: No sample has a gradient of its own.
NONE: dict[str, Case] = {**COUPLED, **MIXED}

_LISTS = (
    DENSE, CONV, NORM, TOKENS, ATTENTION, SHARED, TRAPS, OPERATIONS, PUBLISHED, RECURRENT, ROWS, PLACED, UNCOVERED, COUPLED, MIXED,
)  # fmt: skip
if len({**ALL, **NONE}) != sum(map(len, _LISTS)):
    raise ValueError("two cases of different files have one name")
