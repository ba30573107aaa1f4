"""Conan 2: conan create packaging/conan makes a package of headroom::core, which needs Eigen alone."""

import re
from pathlib import Path

from conan import ConanFile
from conan.tools.cmake import CMake, CMakeToolchain, cmake_layout
from conan.tools.files import copy

# The project's folder; in Conan's cache the export has put the sources beside this file
HERE = Path(__file__).resolve().parent


class Headroom(ConanFile):
    name = "headroom"
    license = "MIT"
    description = "Memory-aware transformer building blocks for music source separation: core"
    package_type = "header-library"
    settings = "os", "compiler", "build_type", "arch"

    def set_version(self):
        text = (HERE.parent.parent / "CMakeLists.txt").read_text()
        self.version = re.search(r"project\(headroom VERSION (\S+)", text)[1]

    def export_sources(self):
        for pattern in ("CMakeLists.txt", "LICENSE", "cmake/*", "include/*", "kernels/*"):
            copy(self, pattern, HERE.parent.parent, self.export_sources_folder)

    def requirements(self):
        self.requires("eigen/[>=3.4 <6]", transitive_headers=True)

    def layout(self):
        cmake_layout(self)

    def generate(self):
        toolchain = CMakeToolchain(self)
        toolchain.cache_variables["HEADROOM_COMPONENTS"] = "core"
        for programs in ("TESTS", "EXAMPLES", "BENCHMARKS", "PYTHON"):
            toolchain.cache_variables[f"HEADROOM_BUILD_{programs}"] = False
        toolchain.generate()

    def build(self):
        CMake(self).configure()

    def package(self):
        CMake(self).install()
        copy(self, "LICENSE", self.source_folder, self.package_folder + "/licenses")

    def package_id(self):
        self.info.clear()

    def package_info(self):
        # The package has a CMake file of its own, and is found by it
        self.cpp_info.set_property("cmake_find_mode", "none")
        self.cpp_info.builddirs = ["share/cmake/headroom"]
        self.cpp_info.bindirs = self.cpp_info.libdirs = []
