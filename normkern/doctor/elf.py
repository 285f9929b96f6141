"""Reads from the ELF dynamic section what a shared library needs on the machine that loads it."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from pathlib import Path

_LOAD, _DYNAMIC = 1, 2  # kinds of segment
_NEEDED, _STRTAB, _VERNEED, _VERNEEDNUM = 1, 5, 0x6FFFFFFE, 0x6FFFFFFF  # tags of the dynamic section


@dataclass(frozen=True)
class Needs:
    """`libraries` by soname, as listed; `versions`: the highest version of each kind of symbol, "GLIBC" -> "2.32"."""

    libraries: list[str]
    versions: dict[str, str]


def needs(file: Path) -> Needs | None:
    """Read a 64-bit little-endian ELF file; None for anything else (macOS, Windows, other processors)."""
    data = file.read_bytes()
    if data[:6] != b"\x7fELF\x02\x01":
        return None
    (table,) = struct.unpack_from("<Q", data, 32)
    entry_size, count = struct.unpack_from("<HH", data, 54)
    segments = [_Segment(*struct.unpack_from("<I4xQQ8xQ", data, table + i * entry_size)) for i in range(count)]
    dynamic = next((s for s in segments if s.kind == _DYNAMIC), None)
    if dynamic is None:
        return Needs([], {})

    entries = list(struct.iter_unpack("<QQ", data[dynamic.offset : dynamic.offset + dynamic.size]))
    values = dict(reversed(entries))  # the first of each tag
    strings = _offset(segments, values[_STRTAB])

    def text(at: int) -> str:
        start = strings + at
        return data[start : data.index(b"\0", start)].decode()

    libraries = [text(value) for tag, value in entries if tag == _NEEDED]
    symbols: list[str] = []
    file_at = _offset(segments, values[_VERNEED]) if _VERNEED in values else 0
    for _ in range(values.get(_VERNEEDNUM, 0)):
        names, first, next_file = struct.unpack_from("<2xH4xII", data, file_at)
        name_at = file_at + first
        for _ in range(names):
            name, next_name = struct.unpack_from("<II", data, name_at + 8)
            symbols.append(text(name))
            name_at += next_name
        file_at += next_file
    return Needs(libraries, _highest(symbols))


@dataclass(frozen=True)
class _Segment:
    kind: int
    offset: int
    address: int
    size: int


def _offset(segments: list[_Segment], address: int) -> int:
    """Return the offset in the file of the byte that is loaded at `address`."""
    home = next(s for s in segments if s.kind == _LOAD and s.address <= address < s.address + s.size)
    return address - home.address + home.offset


def _highest(symbols: list[str]) -> dict[str, str]:
    """["GLIBC_2.14", "GLIBC_2.4", "GCC_3.0"] -> {"GCC": "3.0", "GLIBC": "2.14"}."""
    best: dict[str, tuple[int, ...]] = {}
    for symbol in symbols:
        found = re.fullmatch(r"(\w+?)_(\d+(?:\.\d+)*)", symbol)
        if found:
            number = tuple(map(int, found[2].split(".")))
            best[found[1]] = max(best.get(found[1], ()), number)
    return {kind: ".".join(map(str, best[kind])) for kind in sorted(best)}
