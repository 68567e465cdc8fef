"""Compile the kernels for sm_90 (H100, H200), which needs no GPU, at the smallest and the widest layers.

    python -m tests.runtime.device.compiled [split rows prepare product outer]

Without TRITON_INTERPRET. Prints one line; what the compiler refuses ends it with an error.
"""

import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from poise.runtime.device.fill import prepare_kernel
from poise.runtime.device.gemm import COLUMNS, INNER, ROWS, outer_kernel, product_kernel
from poise.runtime.device.rows import rows_kernel
from poise.runtime.device.split import split_kernel

KERNELS = {
    "split": (split_kernel, ["*i32"] * 7 + ["*i64"] + ["*i32"] * 3 + ["i32", "i32"], {"E_BLOCK": 64}),
    "rows": (rows_kernel, ["*i32"] * 5 + ["i32"], {"E_BLOCK": 4}),
    "prepare": (prepare_kernel, ["*i32"] * 5 + ["*i64"] * 2 + ["*i32"] * 4 + ["*i64"] + ["i32", "i32"], {"COLUMNS": 8}),
}
TILES = {"ROWS": ROWS, "COLUMNS": COLUMNS, "INNER": INNER, "S_PAD": 32}
PRODUCTS = {
    "product": (product_kernel, ["*{0}", "*{0}", "*i32", "*{0}"] + ["i32"] * 9),
    "outer": (outer_kernel, ["*{0}", "*{0}", "*i32", "*{0}"] + ["i32"] * 6),
}
WIDE = {"bf16": tl.float32, "fp32": tl.float32, "fp64": tl.float64}
LAYERS = (
    {"D": 8, "S": 66, "E": 512, "N": 1, "D_PAD": 8, "S_PAD": 128, "E_PAD": 512, "N_PAD": 1, "W_PAD": 8},
    {"D": 256, "S": 4, "E": 512, "N": 32, "D_PAD": 256, "S_PAD": 4, "E_PAD": 512, "N_PAD": 32, "W_PAD": 8},
)


def compiled(kernel, types, constants, warps=8) -> bool:
    signature = dict(zip(kernel.arg_names, [*types, *["constexpr"] * len(constants)], strict=True))
    places = {(kernel.arg_names.index(key),): value for key, value in constants.items()}
    done = triton.compile(
        ASTSource(kernel, signature, places), target=GPUTarget("cuda", 90, 32), options={"num_warps": warps}
    )
    return len(done.asm["cubin"]) > 0


def main() -> None:
    count = 0
    for name in sys.argv[1:] or [*KERNELS, *PRODUCTS]:
        if name in PRODUCTS:
            kernel, types = PRODUCTS[name]
            for kind, wide in WIDE.items():
                named = {key: value for key, value in {**TILES, "WIDE": wide}.items() if key in kernel.arg_names}
                constants = {key: named[key] for key in kernel.arg_names if key in named}
                count += compiled(kernel, [each.format(kind) for each in types], constants, warps=4)
            continue
        kernel, types, blocks = KERNELS[name]
        for layer in LAYERS:
            count += compiled(
                kernel, types, {key: value for key, value in {**layer, **blocks}.items() if key in kernel.arg_names}
            )
    print(f"{count} cubins for sm_90")


if __name__ == "__main__":
    main()
