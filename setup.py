"""The host library: `kernels/host.cpp`, once for each instruction set, chosen when it is loaded."""

import platform
from glob import glob

from setuptools import Extension, setup

X86 = platform.machine() in ("x86_64", "AMD64")
LEVELS = {
    "v2": ["-march=x86-64-v2"],
    "v3": ["-march=x86-64-v3"],
    "v4": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
}

setup(
    ext_modules=[
        Extension(
            f"transducer_loss._host_{name}",
            ["kernels/host.cpp"],
            depends=sorted(glob("kernels/*.cu*")),
            # Infinities and NaN keep their meaning (no -ffast-math); what is given up only concerns errno and traps.
            extra_compile_args=[
                "-std=c++17", "-O3", *flags, "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd", "-fvisibility=hidden",
            ],
            language="c++",
            py_limited_api=True,
        )
        for name, flags in (LEVELS if X86 else {"native": []}).items()
    ],
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)  # fmt: skip
