"""The native module as an optional extension: everything is handed to CMake (CMakeLists.txt, build_backend/)."""

import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_backend"))
import zsq_native  # noqa: E402


class BuildNative(build_ext):
    def run(self) -> None:
        in_place = self.inplace or self.editable_mode
        zsq_native.build(ROOT / "zsq_fast" if in_place else Path(self.build_lib, "zsq_fast"))

    def get_outputs(self) -> list[str]:
        return []  # optional: the module may not be there

    def get_output_mapping(self) -> dict[str, str]:
        return {}


# A kept build/lib would carry modules that were deleted since into the wheel.
build_base = tempfile.TemporaryDirectory(prefix="zsq_fast-build-", ignore_cleanup_errors=True)

setup(
    ext_modules=[Extension("zsq_fast._C", sources=[], optional=True)],  # marks the wheel as specific to this platform
    cmdclass={"build_ext": BuildNative},
    options={"build": {"build_base": build_base.name}},
)
