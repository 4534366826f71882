"""What `pip install` does about the kernels: setuptools' classes that `pyproject.toml` names.

The library is an optional extension: where it cannot be built, setuptools warns and goes on. It depends on no version
of Python, and the wheel says so (py3-none-<platform>). The package itself cannot be imported here, so `build.py` is run
by its path.
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
    """Builds the library in place of an extension module."""

    def build_extension(self, ext: Any) -> None:
        """Builds it to where setuptools wants it: the source tree if the installation is editable, else the wheel."""
        try:
            _BUILD["build"](Path(self.get_ext_fullpath(ext.name)))
        except _BUILD["BuildError"] as error:
            raise CompileError(f"the kernels are not built, the reference will be used: {error}") from error

    def get_ext_filename(self, fullname: str) -> str:
        """A name without the version of Python."""
        return str(Path(*fullname.split(".")).with_name(_BUILD["LIBRARY"]))


class TagWheel(bdist_wheel):
    """Names the wheel."""

    def get_tag(self) -> tuple[str, str, str]:
        """(Python, its ABI, platform)."""
        return "py3", "none", super().get_tag()[2]
