"""A gate for the machine code of the kernels that own dW: what their innermost loop issues, and how many blocks fit."""

from . import sass

FAMILIES = ("outer_products", "conv_products")
THREADS = 128  # per block: csrc/cuda/tile.cuh
REGISTERS = 65536  # of a multiprocessor
#: Of a step: multiply-adds of a thread, quads that it loads for them; and blocks that a multiprocessor holds at least.
TILES = {"float": (32, 3, 3), "double": (16, 4, 2)}
#: Other instructions of the loop, for each multiply-add.
MOST_BESIDE = 1 / 8


def multiply_adds(loop: sass.Loop) -> int:
    return sum(i.kind in ("FFMA", "FFMA2", "DFMA") for i in loop.instructions)


def issues(loop: sass.Loop) -> int:
    """Without what fills the time of double units where there are few."""
    return sum(i.kind != "NOP" for i in loop.instructions)


def hot_loop(kernel: sass.Kernel) -> sass.Loop:
    return max(kernel.loops(), key=multiply_adds)


def issued(kernel: sass.Kernel) -> float:
    """The share of multiply-adds in what the innermost loop issues: the most of the peak that the kernel can reach."""
    loop = hot_loop(kernel)
    return multiply_adds(loop) / issues(loop)


def blocks(kernel: sass.Kernel, shared: int) -> int:
    """That a multiprocessor holds at once, by its registers and its bytes of shared memory."""
    registers = -(-max(kernel.registers, 1) // 8) * 8 * THREADS
    return min(REGISTERS // registers, shared // (kernel.shared + 1024))


def faults(kernel: sass.Kernel, shared: int) -> list[str]:
    """`shared`: bytes of shared memory of a multiprocessor."""
    storage = kernel.arguments[0]
    fmas, quads, resident = TILES["double" if storage == "double" else "float"]
    if not kernel.loops():
        return ["no loop"]
    loop, found = hot_loop(kernel), []
    done, loads = multiply_adds(loop), loop.widths("LDS")
    if loop.loads or loop.stores or loop.widths("STS"):
        found.append("the innermost loop moves more than what it loads from shared memory")
    if narrow := sorted({w for w in loads if w != 16}):
        found.append(f"the innermost loop loads {', '.join(map(str, narrow))} bytes at once from shared memory")
    if done * quads != len(loads) * fmas or not done:
        found.append(f"{done} multiply-adds for {len(loads)} loads in the innermost loop; expected {fmas} for {quads}")
    if (beside := issues(loop) - done - len(loads)) > MOST_BESIDE * done:
        found.append(f"{beside} other instructions for {done} multiply-adds in the innermost loop")
    packs = sum(i.kind in ("LDG", "LD") and i.width == 16 for i in kernel.instructions)
    if kernel.family == "outer_products" and not packs:
        found.append("operands are not loaded in packs of 16 bytes")
    if (held := blocks(kernel, shared)) < resident:
        found.append(f"a multiprocessor holds {held} blocks, expected {resident}")
    return found


def table(kernels: list[sass.Kernel], gpus: dict[str, tuple[str, int]]) -> str:
    """Markdown: a row for each kernel, a column for each architecture; `gpus`: name and bytes of shared memory."""
    architectures = [a for a in gpus if any(k.arch == a for k in kernels)]
    lines = [
        "| kernel | " + " | ".join(f"{a}<br>{gpus[a][0]}" for a in architectures) + " |",
        "|---|" + "---|" * len(architectures),
    ]
    ours = {(k.name, k.arch): k for k in kernels if k.family in FAMILIES}
    for name in sorted({name for name, _ in ours}):
        cells = [ours[name, a] for a in architectures]
        text = [f"{k.registers} · {blocks(k, gpus[k.arch][1])} · {100 * issued(k):.0f} %" for k in cells]
        lines.append(f"| `{name}` | " + " | ".join(text) + " |")
    return "\n".join(lines) + "\n"
