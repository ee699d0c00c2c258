"""The vector instructions that the compiled module may use, and those that this processor has.

Without a comparison, a module built for another processor ends Python with an illegal instruction. `setup.py` runs this
file by its path: it imports nothing of the package.
"""

from __future__ import annotations

from pathlib import Path

RECORD = "_C.instructions"  # a text file beside the compiled module, written when it is built

# Spelt as Linux does, without underscores; in capitals between double underscores, as C++ compilers do.
INSTRUCTIONS = (
    *("avx", "avx2", "fma", "f16c", "bmi2", "avxvnni", "gfni", "vaes", "vpclmulqdq"),
    *("avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl", "avx512ifma", "avx512vbmi", "avx512vbmi2"),
    *("avx512vnni", "avx512bitalg", "avx512vpopcntdq", "avx512bf16", "avx512fp16"),
)


def available(cpuinfo: Path = Path("/proc/cpuinfo")) -> list[str] | None:
    """Those of `INSTRUCTIONS` that this processor has; None where the system does not say, as others than Linux."""
    try:
        with cpuinfo.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                name, _, flags = line.partition(":")
                if name.strip() == "flags":
                    present = flags.replace("_", "").split()
                    return [instruction for instruction in INSTRUCTIONS if instruction in present]
    except OSError:
        pass
    return None


def lacking(record: Path, present: list[str] | None) -> list[str]:
    """What a module built with `record` beside it needs and is not `present`; nothing where either is unknown."""
    if present is None or not record.is_file():
        return []
    return [instruction for instruction in record.read_text(encoding="utf-8").split() if instruction not in present]
