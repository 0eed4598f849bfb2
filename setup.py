"""The host library: `kernels/host.cpp`, once for each instruction set, chosen when it is loaded."""

import copy
import itertools
import os
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from glob import glob

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, CompileError

# Of what is built for, which a cross compiler's caller sets: not of this machine.
X86 = sysconfig.get_platform().endswith("-x86_64")
LEVELS = {
    "v2": ["-march=x86-64-v2"],
    "v3": ["-march=x86-64-v3"],
    "v4": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
}

# Infinities and NaN keep their meaning (no -ffast-math); what is given up only concerns errno and traps.
FLAGS = [
    "-std=c++17", "-O2", "-g0", "-ftree-vectorize", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd",
    "-fvisibility=hidden",
]  # fmt: skip
# The whole of -O3 takes three times as long to compile, and makes gumbel_gate alone faster, by a sixth.
FOR_GCC = ["-fvect-cost-model=dynamic"]

NEEDED = (
    "transducer_loss compiles its kernels for the host: that takes GCC 11, Clang 12 or later, named by CXX unless it is g++. "
    "Debian and Ubuntu: apt-get install g++. Windows: use WSL. macOS: untried. Nothing is compiled where there is a wheel."
)


class BuildLevels(build_ext):
    """Compiles the levels side by side, each in a folder of its own: they share their source, and so its object's name."""

    def build_extensions(self) -> None:
        """Build all extensions."""
        self.check_extensions_list(self.extensions)
        if self.compiler.compiler_type != "unix":
            raise CompileError(f"{NEEDED}\nThe compiler here is of the kind {self.compiler.compiler_type!r}.")

        flags = [*FLAGS, *([] if self._is_clang() else FOR_GCC)]

        def build(extension: Extension) -> None:
            extension.extra_compile_args = [*flags, *extension.extra_compile_args]
            one = copy.copy(self)
            one.build_temp = os.path.join(self.build_temp, extension.name)
            try:
                one.build_extension(extension)
            except CCompilerError as error:
                raise CompileError(f"{NEEDED}\n{error}") from error

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(build, self.extensions))

    def _is_clang(self) -> bool:
        words = getattr(self.compiler, "compiler_so_cxx", self.compiler.compiler_so)
        compiler = itertools.takewhile(lambda word: not word.startswith("-"), words)  # it may be "ccache clang++"
        try:
            said = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError) as error:
            raise CompileError(f"{NEEDED}\n{error}") from error
        return "clang" in said


setup(
    cmdclass={"build_ext": BuildLevels},
    ext_modules=[
        Extension(
            f"transducer_loss._host_{name}",
            ["kernels/host.cpp"],
            depends=sorted(glob("kernels/*.cu*")),
            extra_compile_args=flags,
            language="c++",
            py_limited_api=True,
        )
        for name, flags in (LEVELS if X86 else {"native": []}).items()
    ],
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)  # fmt: skip
