"""What pyproject.toml cannot say: the C++ extension, kernels/ installed as fastmem.kernels, and the
README without links into the repository, which a package index does not have."""

import re
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import find_packages, setup

readme = re.sub(r"^!\[.*\n\n", "", Path("README.md").read_text("utf-8"), flags=re.M)
readme = re.sub(r"\[([^]]+)\]\((?!https?:)[^)]+\)", r"\1", readme)

ParallelCompile("NPY_NUM_BUILD_JOBS").install()

setup(
    long_description=readme,
    long_description_content_type="text/markdown",
    packages=[*find_packages(include=["fastmem", "fastmem.*"]), "fastmem.kernels"],
    package_dir={"fastmem.kernels": "kernels"},
    package_data={"fastmem": ["py.typed", "*.pyi"], "fastmem.report": ["templates/*"]},
    ext_modules=[
        Pybind11Extension(
            "fastmem._core",
            sorted(glob("csrc/*/*.cpp")),
            include_dirs=["csrc"],
            depends=sorted(glob("csrc/*/*.h")),
            cxx_std=17,
            # A product is rounded where the source says so: see csrc/likelihood/forward.h.
            extra_compile_args=["-O3", "-ffp-contract=off", "-Wall", "-Wextra"],
            extra_link_args=["-pthread", "-ldl"],
        )
    ],
)
