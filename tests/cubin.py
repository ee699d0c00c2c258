"""What the kernels of a cubin need of the chip, read by `cuobjdump`, which comes with Triton."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
MOST_THREADS = 1024  # of a block that says nothing about its size
HOPPER_RESERVED = 1024  # bytes that sm_90 keeps for itself in every block's shared memory, counted by cuobjdump
_USAGE = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_THREADS = re.compile(r"EIATTR_(?:MAX_THREADS|REQNTID)\s+Format:.*\s+Value:\s+0x(\w+) 0x(\w+) 0x(\w+)")


@dataclass(frozen=True)
class Usage:
    """One kernel of a cubin; memory in bytes per block, `stack` and `local` in bytes per thread."""

    symbol: str
    architecture: str
    threads: int
    registers: int
    static_shared: int
    stack: int
    local: int
    local_accesses: int  # instructions that load or store local memory: spills, and arrays indexed at run time
    tensor_cores: str  # "HGMMA" (whole warp groups, Hopper), "HMMA" (warps), "none"


def read(cubin: bytes) -> list[Usage]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [CUOBJDUMP, "-res-usage", "-sass", "-elf", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [usage(text, *found) for found in _USAGE.findall(text)]


def usage(text: str, symbol: str, registers: str, stack: str, shared: str, local: str) -> Usage:
    [architecture] = set(re.findall(r"^\s*code for (sm_\w+)$", text, re.MULTILINE))
    instructions = instructions_of(text, symbol)
    reserved = HOPPER_RESERVED if int(shared) and architecture.startswith("sm_90") else 0
    return Usage(
        symbol,
        architecture,
        threads_of(text, symbol),
        int(registers),
        int(shared) - reserved,
        int(stack),
        int(local),
        len(re.findall(r"\b(?:LDL|STL)\b", instructions)),
        "+".join(sorted(set(re.findall(r"\b[A-Z]+MMA\b", instructions)))) or "none",
    )


def threads_of(text: str, symbol: str) -> int:
    """Threads of a block as the kernel itself states them; the most that any block may have where it does not."""
    [section] = re.findall(rf"^\.nv\.info\.{re.escape(symbol)}\n(.*?)^\.", text, re.MULTILINE | re.DOTALL)
    stated = _THREADS.search(section)
    if not stated:
        return MOST_THREADS
    x, y, z = (int(size, 16) for size in stated.groups())
    return x * y * z


def instructions_of(text: str, symbol: str) -> str:
    _, found, after = text.partition(f"Function : {symbol}\n")
    if not found:
        raise ValueError(f"no machine code of {symbol}")
    return after.partition("Function : ")[0]
