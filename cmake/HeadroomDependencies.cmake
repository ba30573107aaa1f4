# headroom_find_library(<name>) defines PkgConfig::<name> where the library is found, by pkg-config, or in the
# usual folders where there is no pkg-config or it does not know of a copy below CMAKE_PREFIX_PATH.
function(headroom_find_library name)
  set(header_of_sndfile sndfile.h)
  set(header_of_soxr soxr.h)
  set(header_of_yaml-cpp yaml-cpp/parser.h)
  set(header_of_rubberband rubberband/RubberBandStretcher.h)
  find_package(PkgConfig QUIET)
  if(PkgConfig_FOUND)
    pkg_check_modules(${name} QUIET IMPORTED_TARGET GLOBAL ${name})
  endif()
  if(TARGET PkgConfig::${name})
    return()
  endif()
  find_path(headroom_include "${header_of_${name}}" NO_CACHE)
  find_library(headroom_library NAMES ${name} NO_CACHE)
  if(headroom_include AND headroom_library)
    add_library(PkgConfig::${name} INTERFACE IMPORTED GLOBAL)
    target_include_directories(PkgConfig::${name} INTERFACE "${headroom_include}")
    target_link_libraries(PkgConfig::${name} INTERFACE "${headroom_library}")
  endif()
endfunction()

# headroom_find_dependencies(<component> <variable>)
#
# Finds what one component (core, headroom, training) needs beyond the component before it, and sets <variable> to what
# is missing, empty when nothing is. The build and the installed package both come through here.
function(headroom_find_dependencies component missing)
  set(${missing} "" PARENT_SCOPE)

  if(component STREQUAL "core")
    # No version here: Eigen's own file takes 3.4 for a wish that 5 does not meet
    find_package(Eigen3 QUIET NO_MODULE)
    if(NOT TARGET Eigen3::Eigen)
      set(${missing} "Eigen 3.4 or 5 (Debian: libeigen3-dev)" PARENT_SCOPE)
    elseif(Eigen3_VERSION VERSION_LESS 3.4)
      set(${missing} "Eigen 3.4 or 5 (Debian: libeigen3-dev), and found ${Eigen3_VERSION} in ${Eigen3_DIR}"
          PARENT_SCOPE)
    endif()
    # Threads are optional: CMAKE_DISABLE_FIND_PACKAGE_OpenMP=ON leaves core single-threaded.
    find_package(OpenMP QUIET COMPONENTS CXX)
    if(OpenMP_CXX_FOUND AND NOT TARGET headroom::openmp)
      add_library(headroom::openmp INTERFACE IMPORTED GLOBAL)
      if(CMAKE_SYSTEM_NAME STREQUAL "Linux")
        # The flag, not the path of the compiler's runtime as in OpenMP::OpenMP_CXX: LibTorch brings a runtime of the
        # same name, and a process must have one. See HeadroomTorch.cmake.
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
    foreach(library IN ITEMS sndfile soxr yaml-cpp)
      headroom_find_library(${library})
    endforeach()
    if(NOT TARGET PkgConfig::sndfile)
      set(${missing} "libsndfile (Debian: libsndfile1-dev)" PARENT_SCOPE)
    elseif(NOT TARGET PkgConfig::soxr)
      set(${missing} "libsoxr (Debian: libsoxr-dev)" PARENT_SCOPE)
    elseif(NOT TARGET PkgConfig::yaml-cpp)
      set(${missing} "yaml-cpp (Debian: libyaml-cpp-dev)" PARENT_SCOPE)
    endif()
    # Optional: without it (Debian: librubberband-dev) training changes neither pitch nor tempo
    headroom_find_library(rubberband)
  endif()
endfunction()
