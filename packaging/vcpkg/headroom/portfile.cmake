# An overlay port: vcpkg install headroom --overlay-ports=packaging/vcpkg. It takes the sources that it lies in.
# Tried with vcpkg's own scripts of August 2026, features core, torch and training, and not with its program.
get_filename_component(SOURCE_PATH "${CMAKE_CURRENT_LIST_DIR}/../../.." ABSOLUTE)
set(components core)
if("torch" IN_LIST FEATURES)
  list(APPEND components headroom)
endif()
if("training" IN_LIST FEATURES)
  list(APPEND components training)
endif()
vcpkg_cmake_configure(
  SOURCE_PATH "${SOURCE_PATH}"
  OPTIONS
    "-DHEADROOM_COMPONENTS=${components}"
    -DHEADROOM_BUILD_TESTS=OFF
    -DHEADROOM_BUILD_EXAMPLES=OFF
    -DHEADROOM_BUILD_BENCHMARKS=OFF
    -DHEADROOM_BUILD_PYTHON=OFF
)
vcpkg_cmake_install()
vcpkg_cmake_config_fixup(CONFIG_PATH share/cmake/headroom)
file(REMOVE_RECURSE "${CURRENT_PACKAGES_DIR}/debug")
vcpkg_install_copyright(FILE_LIST "${SOURCE_PATH}/LICENSE")
