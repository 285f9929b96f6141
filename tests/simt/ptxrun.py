"""Executes PTX in numpy: a register is an array with a number for each thread of the whole grid.

The code is nvcc's own, so that what the emulator says of the kernels, compiled by g++, is said of the compiled kernels
too. Threads that are at the same instruction run it together; those furthest behind go first. An instruction that is
not known, or whose result differs between devices, is an error, never a guess. Out-of-bounds and misaligned accesses,
shuffles without all their lanes and divergent barriers are found; races and missing barriers are the emulator's to find.
"""

import ctypes
import re

import numpy as np

UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOAT = {16: np.float16, 32: np.float32, 64: np.float64}
KINDS = {"u": UNSIGNED, "b": UNSIGNED, "s": SIGNED, "f": FLOAT}
WARP = 32


class PtxError(RuntimeError):
    """The kernel does something wrong, or something that is not known here."""


class Memory:
    """What kernels may touch of this process: stretches of bytes.

    Args:
        stretches: (address, size) of each.
    """

    def __init__(self, stretches):
        stretches = sorted(stretches)
        self.starts = np.array([a for a, _ in stretches], np.int64)
        self.ends = np.array([a + n for a, n in stretches], np.int64)
        self.read = self.written = 0
        self.base = int(self.starts[0]) // 16 * 16
        size = -(-(int(self.ends.max()) - self.base) // 16) * 16
        # A window over all addresses, of which only those within the stretches are ever used.
        self.bytes = np.frombuffer((ctypes.c_uint8 * size).from_address(self.base), np.uint8)
        self.windows = {bits: self.bytes.view(kind) for bits, kind in UNSIGNED.items()}

    def check(self, addresses, size):
        """The positions of the addresses that are not allowed."""
        at = np.searchsorted(self.starts, addresses, "right") - 1
        inside = (at >= 0) & (addresses + size <= self.ends[np.maximum(at, 0)])
        return np.nonzero(~inside)[0]


class Grid:
    """One launch.

    Args:
        kernel: of `ptx.parse`.
        grid, block: threads in x alone.
        parameters: bytes, as the launch gave them.
        memory: shared by launches.
        fma: `fma(a, b, c)` with one rounding, of arrays of float32 or float64.
    """

    def __init__(self, kernel, grid, block, parameters, memory, fma):
        assert block % WARP == 0
        self.kernel, self.memory, self.fma = kernel, memory, fma
        self.block_size, self.count = block, grid * block
        threads = np.arange(self.count, dtype=np.uint32)
        self.thread, self.block = threads % np.uint32(block), threads // np.uint32(block)
        one = np.ones(self.count, np.uint32)
        self.special = {
            "%tid.x": self.thread, "%ctaid.x": self.block, "%ntid.x": one * block, "%nctaid.x": one * grid,
            "%laneid": self.thread % WARP,
        }  # fmt: skip
        self.parameters = np.frombuffer(parameters + bytes(16), np.uint8)
        self.parameter_windows = {}
        self.registers = {}
        self.shared_at, size = {}, 16
        for name, (alignment, length) in kernel.shared.items():
            # Exactly the alignment that is promised, and a gap behind.
            size = -(-size // 16) * 16 + (alignment if alignment < 16 else 0)
            self.shared_at[name] = (size, length)
            size += length + 16
        self.shared = np.full((grid, size), 0xFF, np.uint8)

    # ---- Operands ----------------------------------------------------------------------------------------------

    def _constant(self, operand, bits):
        if operand in self.shared_at:
            return self.shared_at[operand][0]
        if operand in self.kernel.parameters:
            return self.kernel.parameters[operand][0]
        if operand[:2] in ("0f", "0F", "0d", "0D"):
            return int(operand[2:], 16)
        return int(operand.rstrip("U"), 0) & ((1 << bits) - 1)

    def value(self, operand, kind, bits, lanes):
        """The operand as numbers of a type, one for each lane."""
        numbers = KINDS[kind][bits]
        if not operand.startswith("%"):
            raw = np.array(self._constant(operand, bits), np.uint64).astype(UNSIGNED[bits]).view(numbers)
            return np.broadcast_to(raw, lanes.size)
        register = self.special.get(operand)
        if register is None:
            register = self.registers.get(operand)
        if register is None:  # nvcc computes ahead of a branch what is then not used: a NaN, should it be used
            return np.full(lanes.size, (1 << bits) - 1, UNSIGNED[bits]).view(numbers)
        raw = register[lanes]
        return (raw if raw.dtype.itemsize * 8 == bits else raw.astype(UNSIGNED[bits])).view(numbers)

    def truth(self, operand, lanes):
        if operand.startswith("%"):
            return self.registers[operand][lanes]
        return np.full(lanes.size, bool(int(operand)))

    def put(self, operand, numbers, lanes):
        if operand == "_":
            return
        if numbers.dtype != bool:
            numbers = np.ascontiguousarray(numbers).view(UNSIGNED[numbers.dtype.itemsize * 8])
        register = self.registers.get(operand)
        if register is None or register.dtype != numbers.dtype:
            register = self.registers[operand] = np.zeros(self.count, numbers.dtype)
        register[lanes] = numbers

    # ---- Memory ------------------------------------------------------------------------------------------------

    def _addresses(self, operand, lanes):
        name, _, offset = operand.strip("[] ").partition("+")
        name, offset = name.strip(), int(offset, 0) if offset else 0
        bits = 32 if re.fullmatch(r"%r\d+", name) else 64
        return self.value(name, "u", bits, lanes).astype(np.int64) + offset

    def _move(self, instruction, lanes):
        opcode, operands, text = instruction.opcode, instruction.operands, instruction.text
        is_load = opcode[0] == "ld"
        kind, bits = opcode[-1][0], int(opcode[-1][1:])
        size = bits // 8
        count = next((int(part[1:]) for part in opcode if re.fullmatch(r"v\d", part)), 1)
        space = next((s for s in ("param", "shared", "global") if s in opcode), None)
        if space is None or "volatile" in opcode:
            raise PtxError(f"not known: {text}")
        address, registers = operands if not is_load else operands[::-1]
        registers = [r.strip() for r in registers.strip("{} ").split(",")]
        addresses = self._addresses(address, lanes)
        if (wrong := np.nonzero(addresses % (size * count))[0]).size:
            raise PtxError(f"misaligned: {text}{self._where(lanes[wrong[0]])}")
        if space == "global":
            if (wrong := self.memory.check(addresses, size * count)).size:
                raise PtxError(
                    f"outside every buffer: {text} at {addresses[wrong[0]]:#x}{self._where(lanes[wrong[0]])}"
                )
            if is_load:
                self.memory.read += addresses.size * size * count
            else:
                self.memory.written += addresses.size * size * count
            window, at = self.memory.windows[bits], (addresses - self.memory.base) // size
        elif space == "shared":
            inside = np.zeros(lanes.size, bool)
            for begin, length in self.shared_at.values():
                inside |= (addresses >= begin) & (addresses + size * count <= begin + length)
            if not inside.all():
                raise PtxError(f"outside every shared array: {text}{self._where(lanes[np.argmin(inside)])}")
            row = self.shared.shape[1]
            window = None
            at = self.block[lanes].astype(np.int64) * row + addresses
        else:
            window = None
            at = addresses
        for k, register in enumerate(registers):
            if window is not None:
                if is_load:
                    raw = window[at + k]
                else:
                    window[at + k] = self.value(register, "u", bits, lanes)
                    continue
            else:
                store = self.shared.reshape(-1) if space == "shared" else self.parameters
                each = (at + k * size)[:, None] + np.arange(size)
                if not is_load:
                    store[each] = (
                        np.ascontiguousarray(self.value(register, "u", bits, lanes)).view(np.uint8).reshape(-1, size)
                    )
                    continue
                raw = store[each].view(UNSIGNED[bits]).reshape(-1)
            if bits == 8:  # there are no registers of 8 bits
                raw = raw.view(np.int8).astype(np.int16) if kind == "s" else raw.astype(np.uint16)
            self.put(register, raw, lanes)

    def _where(self, lane):
        return f" [block {self.block[lane]}, thread {self.thread[lane]}]"

    # ---- Instructions ------------------------------------------------------------------------------------------

    def _shuffle(self, instruction, lanes):
        text, mode, operands = instruction.text, instruction.opcode[2], instruction.operands
        into = operands[0].split("|")
        value, by, clamp, mask = (self.value(x, "u", 32, lanes) for x in operands[1:5])
        lane, first = (self.thread[lanes] % WARP).astype(np.int64), lanes - self.thread[lanes] % WARP
        present = np.zeros(self.count // WARP, np.uint64)
        np.bitwise_or.at(present, first // WARP, np.uint64(1) << lane.astype(np.uint64))
        absent = np.nonzero(mask.astype(np.uint64) & ~present[first // WARP])[0]
        if absent.size:
            raise PtxError(
                f"not all lanes of mask {mask[absent[0]]:#x} are here: {text}{self._where(lanes[absent[0]])}"
            )
        everyone = np.zeros(self.count, np.uint32)
        everyone[lanes] = value
        by, clamp = by.astype(np.int64), clamp.astype(np.int64)
        segment = (clamp >> 8) & 31
        low, high = lane & segment, (lane & segment) | (clamp & 31 & ~segment)
        sources = {"up": lane - by, "down": lane + by, "bfly": lane ^ by, "idx": low | (by & ~segment & 31)}
        source = sources[mode]
        in_range = source >= high if mode == "up" else source <= high
        self.put(into[0], everyone[first + np.where(in_range, source, lane)], lanes)
        if len(into) > 1:
            self.put(into[1], in_range, lanes)

    def _move_register(self, instruction, lanes):
        into, source = instruction.operands
        kind = instruction.opcode[-1]
        if kind == "pred":
            return self.put(into, self.truth(source, lanes), lanes)
        bits = int(kind[1:])
        if source.startswith("{"):
            parts = [p.strip() for p in source.strip("{}").split(",")]
            each = bits // len(parts)
            whole = np.zeros(lanes.size, UNSIGNED[bits])
            for k, part in enumerate(parts):
                whole |= self.value(part, "u", each, lanes).astype(UNSIGNED[bits]) << UNSIGNED[bits](k * each)
            return self.put(into, whole, lanes)
        whole = self.value(source, "u", bits, lanes)
        if not into.startswith("{"):
            return self.put(into, whole, lanes)
        parts = [p.strip() for p in into.strip("{}").split(",")]
        each = bits // len(parts)
        for k, part in enumerate(parts):
            self.put(part, (whole >> UNSIGNED[bits](k * each)).astype(UNSIGNED[each]), lanes)
        return None

    def _convert(self, instruction, lanes):
        *how, to, source = instruction.opcode[1:]
        is_cut = how == ["rzi"]  # towards zero, to a whole number
        if to[:2] == "bf" or source[:2] == "bf" or (to[0] != "f" and source[0] == "f" and not is_cut) or "ftz" in how:
            raise PtxError(f"not known: {instruction.text}")
        if to[0] == "f" and int(to[1:]) <= int(source[1:] if source[0] == "f" else 64) and how not in (["rn"], []):
            raise PtxError(f"not known: {instruction.text}")
        numbers = self.value(instruction.operands[1], source[0], int(source[1:]), lanes)
        self.put(instruction.operands[0], numbers.astype(KINDS[to[0]][int(to[1:])]), lanes)

    def _compare(self, instruction, lanes):
        _, relation, *combine, kind = instruction.opcode
        into, *operands = instruction.operands
        a, b = (self.value(x, kind[0], int(kind[1:]), lanes) for x in operands[:2])
        nan = np.isnan(a) | np.isnan(b) if kind[0] == "f" else np.zeros(lanes.size, bool)
        name = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(relation, relation)
        if relation in ("nan", "num"):
            truth = nan if relation == "nan" else ~nan
        else:
            unordered = kind[0] == "f" and len(name) == 3
            compare = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
                       "ge": np.greater_equal}[name[:2]]  # fmt: skip
            truth = compare(a, b) | nan if unordered else compare(a, b) & ~nan
        if combine:
            truth = self._logic(combine[0])(truth, self.truth(operands[2], lanes))
        self.put(into, truth, lanes)

    @staticmethod
    def _logic(name):
        return {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[name]

    def _permute(self, instruction, lanes):  # bytes of two words
        into, a, b, selector = instruction.operands
        low, high, chosen = (self.value(x, "u", 32, lanes).astype(np.uint64) for x in (a, b, selector))
        both, result = low | high << np.uint64(32), np.zeros(lanes.size, np.uint64)
        for k in range(4):
            nibble = chosen >> np.uint64(4 * k) & np.uint64(15)
            if (nibble & np.uint64(8)).any():
                raise PtxError(f"not known: {instruction.text}")
            result |= (both >> (nibble * np.uint64(8)) & np.uint64(255)) << np.uint64(8 * k)
        self.put(into, result.astype(np.uint32), lanes)

    def _arithmetic(self, instruction, lanes):
        name, *how, kind = instruction.opcode
        into, *operands = instruction.operands
        if kind == "pred":
            truths = [self.truth(x, lanes) for x in operands]
            return self.put(into, ~truths[0] if name == "not" else self._logic(name)(*truths), lanes)
        letter, bits = kind[0], int(kind[1:])
        if name in ("shl", "shr"):
            return self._shift(instruction, lanes)
        if name == "mul" and "wide" in how:
            wide = KINDS[letter][2 * bits]
            a, b = (self.value(x, letter, bits, lanes).astype(wide) for x in operands)
            return self.put(into, a * b, lanes)
        if name == "mad" and how == ["lo"]:
            a, b, c = (self.value(x, letter, bits, lanes) for x in operands)
            return self.put(into, a * b + c, lanes)
        if letter == "f":
            known = {"add": ("rn",), "sub": ("rn",), "mul": ("rn",), "div": ("rn",), "rcp": ("rn",), "sqrt": ("rn",),
                     "fma": ("rn",), "neg": (), "abs": (), "min": (), "max": ()}  # fmt: skip
        else:
            known = {"add": (), "sub": (), "mul": ("lo",), "div": (), "rem": (), "neg": (), "abs": (), "min": (),
                     "max": (), "and": (), "or": (), "xor": (), "not": ()}  # fmt: skip
        if known.get(name) != tuple(how) or (bits == 16 and letter == "f"):
            raise PtxError(f"not known: {instruction.text}")
        values = [self.value(x, letter, bits, lanes) for x in operands]
        if name == "fma":
            return self.put(into, self.fma(*values), lanes)
        if name == "rcp":
            return self.put(into, values[0].dtype.type(1) / values[0], lanes)
        if name in ("div", "rem") and letter != "f":
            return self.put(into, self._divide(name, *values), lanes)
        apply = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "sqrt": np.sqrt,
                 "neg": np.negative, "abs": np.abs, "min": np.fmin if letter == "f" else np.minimum,
                 "max": np.fmax if letter == "f" else np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
                 "xor": np.bitwise_xor, "not": np.bitwise_not}[name]  # fmt: skip
        return self.put(into, apply(*values), lanes)

    @staticmethod
    def _divide(name, a, b):  # towards zero; what a division by zero gives nobody may use
        safe = np.where(b == 0, 1, b).astype(b.dtype)
        if a.dtype.kind == "u":
            return a // safe if name == "div" else a % safe
        quotient = (np.abs(a) // np.abs(safe) * (np.sign(a) * np.sign(safe))).astype(a.dtype)
        return quotient if name == "div" else a - quotient * safe

    def _shift(self, instruction, lanes):
        name, kind = instruction.opcode[0], instruction.opcode[-1]
        into, value, by = instruction.operands
        bits, letter = int(kind[1:]), kind[0]
        numbers, by = self.value(value, letter, bits, lanes), self.value(by, "u", 32, lanes)
        within = np.minimum(by, bits - 1).astype(numbers.dtype)
        if name == "shl":
            return self.put(into, np.where(by >= bits, 0, numbers << within).astype(numbers.dtype), lanes)
        shifted = numbers >> within
        return self.put(
            into, shifted if letter == "s" else np.where(by >= bits, 0, shifted).astype(shifted.dtype), lanes
        )

    def _insert(self, instruction, lanes):  # the low bits of one word into another, from a position on
        into, a, b, position, length = instruction.operands
        bits = int(instruction.opcode[-1][1:])
        a, b = (self.value(x, "u", bits, lanes) for x in (a, b))
        at, size = (self.value(x, "u", 32, lanes).astype(np.uint64) for x in (position, length))
        if (at + size > bits).any() or (at >= bits).any():
            raise PtxError(f"not known: {instruction.text}")
        every, one = np.uint64(2**64 - 1), np.uint64(1)
        low = np.where(size >= 64, every, (one << np.minimum(size, np.uint64(63))) - one)
        wide = (b.astype(np.uint64) & ~(low << at)) | ((a.astype(np.uint64) & low) << at)
        self.put(into, wide.astype(b.dtype), lanes)

    def _select(self, instruction, lanes):
        into, a, b, chooses = instruction.operands
        bits = int(instruction.opcode[-1][1:])
        a, b = (self.value(x, "u", bits, lanes) for x in (a, b))
        self.put(into, np.where(self.truth(chooses, lanes), a, b), lanes)

    def _execute(self, instruction, lanes):
        name = instruction.opcode[0]
        special = {"ld": self._move, "st": self._move, "shfl": self._shuffle, "mov": self._move_register,
                   "cvt": self._convert, "setp": self._compare, "prmt": self._permute, "selp": self._select,
                   "bfi": self._insert}  # fmt: skip
        if name in special:
            special[name](instruction, lanes)
        elif name == "cvta":
            self.put(instruction.operands[0], self.value(instruction.operands[1], "u", 64, lanes), lanes)
        else:
            self._arithmetic(instruction, lanes)

    # ---- Order -------------------------------------------------------------------------------------------------

    def run(self):
        """To the end of all threads.

        Raises:
            PtxError: the kernel does something wrong, or something that is not known here.
        """
        instructions, labels = self.kernel.instructions, self.kernel.labels
        ready, waiting = {0: np.arange(self.count)}, {}

        def join(at, lanes):
            ready[at] = np.union1d(ready[at], lanes) if at in ready else lanes

        with np.errstate(all="ignore"):
            while ready or waiting:
                if not ready:
                    ready, waiting = self._release(waiting), {}
                at = min(ready)
                lanes = ready.pop(at)
                others = min(ready, default=len(instructions))
                while lanes.size:
                    if at >= others:
                        join(at, lanes)
                        break
                    instruction = instructions[at]
                    name, does = instruction.opcode[0], lanes
                    if instruction.predicate:
                        register, negated = instruction.predicate
                        truth = self.truth(register, lanes) ^ negated
                        does = lanes[truth]
                        if name in ("bra", "ret", "exit", "bar"):
                            lanes = lanes[~truth]
                    elif name in ("bra", "ret", "exit", "bar"):
                        lanes = lanes[:0]
                    if name == "bra" and does.size:
                        join(labels[instruction.operands[-1]], does)
                        others = min(ready)
                    elif name == "bar" and does.size:
                        if instruction.opcode[1] != "sync" or instruction.operands != ["0"]:
                            raise PtxError(f"not known: {instruction.text}")
                        waiting[at] = np.union1d(waiting[at], does) if at in waiting else does
                    elif name not in ("bra", "ret", "exit", "bar") and does.size:
                        self._execute(instruction, does)
                    at += 1

    def _release(self, waiting):
        """Nobody can run: every block is at a barrier, all its threads at the same one."""
        for at, lanes in waiting.items():
            blocks, counts = np.unique(self.block[lanes], return_counts=True)
            short = blocks[counts != self.block_size]
            if short.size:
                raise PtxError(f"block {short[0]}: not all threads wait at {self.kernel.instructions[at].text}")
        return {at + 1: lanes for at, lanes in waiting.items()}
