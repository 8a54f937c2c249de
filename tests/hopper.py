"""Triton's kernels compiled for a Hopper GPU, without one: what its interpreter does not see. For tests, in a
process apart.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Built:
    """What came out: texts of two stages, bytes of shared memory, registers of a thread and bytes that did
    not fit in them.
    """

    ttgir: str
    ptx: str
    shared: int
    registers: int
    spilled: int


def loops(ptx: str) -> list[str]:
    """The code of a kernel's loops, none in another: from a label to the branch back to it."""
    return [
        str(body) for _, body in re.findall(r"(\$L__BB\d+_\d+):(.*?)\bbra(?:\.uni)?\s+\1;", ptx, re.DOTALL)
    ]


def build(
    kernel: Any, pointers: dict[str, str], constants: dict[str, Any], folder: Path, **options: int
) -> Built:
    """`kernel` for sm_90. Arguments are `pointers` (name to type), `constants`, and 32-bit integers, or a
    float called eps.
    """
    names = kernel.arg_names
    others = {
        name: "constexpr" if name in constants else "fp32" if name == "eps" else "i32" for name in names
    }
    types = others | pointers
    even = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name in names
        if types[name] not in ("constexpr", "fp32")
    }
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=types, constexprs=values, attrs=even)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    cubin = folder / f"{kernel.__name__}.cubin"
    cubin.write_bytes(built.asm["cubin"])
    usage = subprocess.run(
        [TOOLS / "cuobjdump", "-res-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", usage)[-1]
    return Built(built.asm["ttgir"], built.asm["ptx"], built.metadata.shared, int(registers), int(stack))
