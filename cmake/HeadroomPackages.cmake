# What an installation has for those who do not use CMake, and what CPack makes of it.

# pkg-config: found relative to the file, so that the installation may be moved
set(pkgconfig "${CMAKE_INSTALL_DATADIR}/pkgconfig")
file(RELATIVE_PATH to_prefix "/${pkgconfig}" "/")
string(REGEX REPLACE "/$" "" to_prefix "${to_prefix}")
configure_file(cmake/headroom-core.pc.in headroom-core.pc @ONLY)
install(FILES "${CMAKE_CURRENT_BINARY_DIR}/headroom-core.pc" DESTINATION "${pkgconfig}")

# The licence, which asks to be in every copy, where Debian looks for it
install(FILES LICENSE DESTINATION "${CMAKE_INSTALL_DATADIR}/doc/libheadroom-dev" RENAME copyright)

# `cpack` in the build folder makes libheadroom-dev_VERSION_all.deb; of another project's package this is no part
if(NOT PROJECT_IS_TOP_LEVEL)
  return()
endif()
set(CPACK_GENERATOR DEB)
set(CPACK_PACKAGE_NAME libheadroom-dev)
set(CPACK_PACKAGE_CONTACT "the authors of headroom")
set(CPACK_PACKAGING_INSTALL_PREFIX /usr)
set(CPACK_DEBIAN_FILE_NAME DEB-DEFAULT)
if(NOT "kernels" IN_LIST HEADROOM_COMPONENTS)
  set(CPACK_DEBIAN_PACKAGE_ARCHITECTURE all)
endif()
set(CPACK_DEBIAN_PACKAGE_SECTION libdevel)
set(CPACK_DEBIAN_PACKAGE_DEPENDS "libeigen3-dev (>= 3.4)")
set(CPACK_DEBIAN_PACKAGE_SUGGESTS "nlohmann-json3-dev (>= 3.11), libsndfile1-dev, libsoxr-dev, libyaml-cpp-dev")
include(CPack)
