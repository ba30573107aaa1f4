# Defines the target headroom::torch, LibTorch as this library links it, unless LibTorch cannot be found.
#
# A target `torch` that the project already has is used as it is. Otherwise LibTorch's folder (the one with include/ and
# lib/) is looked for in Torch_DIR, CMAKE_PREFIX_PATH, the system folders and the checkout's .venv, and its libraries
# are imported directly. Its own package file is left alone: for a CUDA build it refuses to configure without the whole
# CUDA toolkit, which this library does not need.
if(TARGET headroom::torch)
  return()
endif()
if(TARGET torch)
  add_library(headroom::torch INTERFACE IMPORTED GLOBAL)
  target_link_libraries(headroom::torch INTERFACE torch)
  return()
endif()

function(headroom_import_torch)
  # CMAKE_PREFIX_PATH may hold the folder torch or torch.utils.cmake_prefix_path, which is torch/share/cmake.
  file(GLOB checkout "${CMAKE_CURRENT_FUNCTION_LIST_DIR}/../.venv/lib/python3*/site-packages/torch")
  find_path(include torch/csrc/api/include/torch/torch.h NO_CACHE
            HINTS "${Torch_DIR}/../../.." PATHS ${checkout} PATH_SUFFIXES include ../../include)
  get_filename_component(include "${include}" ABSOLUTE)
  get_filename_component(root "${include}" DIRECTORY)
  find_library(torch_cpu torch_cpu NO_CACHE HINTS "${root}/lib")
  find_library(c10 c10 NO_CACHE HINTS "${root}/lib")
  if(NOT include OR NOT torch_cpu OR NOT c10)
    return()
  endif()
  cmake_path(GET torch_cpu PARENT_PATH lib)

  # A program names no symbol of the device libraries, they register themselves when loaded: keep them although unused.
  set(devices "")
  foreach(name IN ITEMS torch_cuda torch_hip torch_xpu)
    find_library(${name} ${name} NO_CACHE NO_DEFAULT_PATH PATHS "${lib}")
    if(${name})
      list(APPEND devices "-Wl,--push-state,--no-as-needed,${${name}},--pop-state")
    endif()
  endforeach()

  # core's threads and LibTorch's share one OpenMP runtime, the one in LibTorch's folder if there is one. It comes
  # before the compiler's on the linker's command line, so a program is bound to the versions it will meet when it runs,
  # and --as-needed drops the compiler's runtime, which has nothing left to offer.
  file(GLOB openmp "${lib}/libgomp*.so*" "${lib}/libiomp5.so" "${lib}/libomp.so")

  # std::string in LibTorch's functions has the same layout as in the program.
  file(STRINGS "${c10}" cxx11_names REGEX "__cxx11" LIMIT_COUNT 1)
  set(cxx11_abi 0)
  if(cxx11_names)
    set(cxx11_abi 1)
  endif()

  add_library(headroom::torch INTERFACE IMPORTED GLOBAL)
  target_include_directories(headroom::torch INTERFACE "${include}" "${include}/torch/csrc/api/include")
  target_compile_definitions(headroom::torch INTERFACE _GLIBCXX_USE_CXX11_ABI=${cxx11_abi})
  target_link_libraries(headroom::torch INTERFACE ${devices} "${torch_cpu}" "${c10}" ${openmp} -Wl,--as-needed)
  message(STATUS "LibTorch: ${root}")
endfunction()
headroom_import_torch()
