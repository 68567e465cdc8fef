"""Compile the kernels for sm_90 (H100, H200), which needs no GPU, at the smallest and the widest layers.

    python -m tests.runtime.device.compiled [split rows fill decide]

Without TRITON_INTERPRET. Prints one line; what the compiler refuses ends it with an error.
"""

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from poise.runtime.device.decide import decide_kernel
from poise.runtime.device.fill import fill_kernel
from poise.runtime.device.rows import rows_kernel
from poise.runtime.device.split import split_kernel

KERNELS = {
    "split": (split_kernel, ["*i32"] * 7 + ["*i64"] + ["*i32"] * 3 + ["i32", "i32"], {"E_BLOCK": 64}),
    "rows": (rows_kernel, ["*i32"] * 5 + ["i32"], {"E_BLOCK": 4}),
    "fill": (fill_kernel, ["*i32"] * 3 + ["*i64"] + ["*i32"] * 3 + ["i32", "i32"], {"COLUMNS": 8}),
    "decide": (decide_kernel, ["*i32"] * 6 + ["*i64"] * 2 + ["*i32", "*i64"], {}),
}
LAYERS = (
    {"D": 8, "S": 66, "E": 512, "N": 1, "D_PAD": 8, "S_PAD": 128, "E_PAD": 512, "N_PAD": 1, "W_PAD": 8},
    {"D": 256, "S": 4, "E": 512, "N": 32, "D_PAD": 256, "S_PAD": 4, "E_PAD": 512, "N_PAD": 32, "W_PAD": 8},
)


def main() -> None:
    count = 0
    for name in sys.argv[1:] or KERNELS:
        kernel, types, blocks = KERNELS[name]
        for layer in LAYERS:
            constants = {key: value for key, value in {**layer, **blocks}.items() if key in kernel.arg_names}
            signature = dict(zip(kernel.arg_names, [*types, *["constexpr"] * len(constants)], strict=True))
            places = {(kernel.arg_names.index(key),): value for key, value in constants.items()}
            done = triton.compile(
                ASTSource(kernel, signature, places), target=GPUTarget("cuda", 90, 32), options={"num_warps": 8}
            )
            count += len(done.asm["cubin"]) > 0
    print(f"{count} cubins for sm_90")


if __name__ == "__main__":
    main()
