# headroom_find_dependencies(<component> <variable>)
#
# Finds what one component (core, headroom, training) needs beyond the component before it, and sets <variable> to what is
# missing, empty when nothing is. The build and the installed package both come through here.
function(headroom_find_dependencies component missing)
  set(${missing} "" PARENT_SCOPE)

  if(component STREQUAL "core")
    find_package(Eigen3 3.4 QUIET NO_MODULE)
    if(NOT TARGET Eigen3::Eigen)
      set(${missing} "Eigen 3.4 (Debian: libeigen3-dev)" PARENT_SCOPE)
    endif()
    # Threads are optional: CMAKE_DISABLE_FIND_PACKAGE_OpenMP=ON leaves core single-threaded.
    find_package(OpenMP QUIET COMPONENTS CXX)
    if(OpenMP_CXX_FOUND AND NOT TARGET headroom::openmp)
      add_library(headroom::openmp INTERFACE IMPORTED GLOBAL)
      if(CMAKE_SYSTEM_NAME STREQUAL "Linux")
        # The flag, not the path of the compiler's runtime as in OpenMP::OpenMP_CXX: LibTorch brings a runtime of the same
        # name, and a process must have one. See HeadroomTorch.cmake.
        separate_arguments(flags NATIVE_COMMAND "${OpenMP_CXX_FLAGS}")
        target_compile_options(headroom::openmp INTERFACE ${flags})
        target_link_options(headroom::openmp INTERFACE ${flags})
      else()
        target_link_libraries(headroom::openmp INTERFACE OpenMP::OpenMP_CXX)
      endif()
    endif()

  elseif(component STREQUAL "headroom")
    include("${CMAKE_CURRENT_FUNCTION_LIST_DIR}/HeadroomTorch.cmake")
    if(NOT TARGET headroom::torch)
      set(${missing} "LibTorch (pip install torch, then -DCMAKE_PREFIX_PATH=<the folder torch>)" PARENT_SCOPE)
    endif()

  elseif(component STREQUAL "training")
    find_package(nlohmann_json 3.11 QUIET)
    if(NOT TARGET nlohmann_json::nlohmann_json)
      set(${missing} "nlohmann_json 3.11 (Debian: nlohmann-json3-dev)" PARENT_SCOPE)
    endif()
    find_package(PkgConfig QUIET)
    if(PkgConfig_FOUND)
      pkg_check_modules(sndfile QUIET IMPORTED_TARGET GLOBAL sndfile)
    endif()
    if(NOT TARGET PkgConfig::sndfile)
      set(${missing} "pkg-config and libsndfile (Debian: pkg-config libsndfile1-dev)" PARENT_SCOPE)
    endif()
  endif()
endfunction()
