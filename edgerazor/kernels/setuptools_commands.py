"""The setuptools commands that `pyproject.toml` names: they build the kernel library during `pip install`.

The library is an optional extension: where it cannot be built, setuptools warns and continues. It does not depend on
the version of Python, and the tag of the wheel says so (py3-none-<platform>). setuptools loads this file alone, before
the package can be imported, so `build.py` is run by its path.
"""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

_BUILD = runpy.run_path(str(Path(__file__).with_name("build.py")))


class BuildKernels(build_ext):
    """Builds the kernel library in place of an extension module."""

    def build_extension(self, ext: Any) -> None:
        """Builds it where setuptools wants it: in the source tree for an editable installation, else in the wheel."""
        try:
            _BUILD["build"](Path(self.get_ext_fullpath(ext.name)))
        except _BUILD["BuildError"] as error:
            raise CompileError(f"the kernels are not built, the reference will be used: {error}") from error

    def get_ext_filename(self, fullname: str) -> str:
        """The file name of the library, which does not contain the version of Python."""
        return str(Path(*fullname.split(".")).with_name(_BUILD["LIBRARY"]))


class TagWheel(bdist_wheel):
    """Tags the wheel as one for every version of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """The tags of Python, its ABI and the platform."""
        return "py3", "none", super().get_tag()[2]
