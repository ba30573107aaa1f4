# What this project's own tests, examples and benchmarks share; a project that uses the library sees none of it.
if(NOT (HEADROOM_BUILD_TESTS OR HEADROOM_BUILD_EXAMPLES OR HEADROOM_BUILD_BENCHMARKS OR HEADROOM_BUILD_PYTHON))
  return()
endif()

set(HEADROOM_WARNINGS -Wall -Wextra)
if(CMAKE_CXX_COMPILER_ID STREQUAL GNU AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
  # Thousands from the compiler's own avx512fintrin.h, whose "undefined" vectors it takes for ours
  list(APPEND HEADROOM_WARNINGS -Wno-uninitialized -Wno-maybe-uninitialized)
endif()

add_library(headroom_development INTERFACE)
# -fPIC: shared libraries may have the precompiled header and the kernels in common with programs. CMake's own property
# would compile programs with -fPIE, and the compiler would pass the header over.
target_compile_options(headroom_development INTERFACE ${HEADROOM_WARNINGS} -fPIC)
target_compile_definitions(headroom_development INTERFACE HEADROOM_SEPARATE_KERNELS HEADROOM_SEPARATE_TRAINING)
if(HEADROOM_NATIVE)
  target_compile_options(headroom_development INTERFACE -march=native)
endif()
if(HEADROOM_WERROR)
  target_compile_options(headroom_development INTERFACE -Werror)
endif()
if(HEADROOM_SANITIZE)
  # vptr: LibTorch does not export the types of all its objects
  set(HEADROOM_SANITIZERS -fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=all)
  target_compile_options(headroom_development INTERFACE ${HEADROOM_SANITIZERS} -fno-omit-frame-pointer)
  target_compile_definitions(headroom_development INTERFACE _GLIBCXX_ASSERTIONS)
  target_link_options(headroom_development INTERFACE ${HEADROOM_SANITIZERS})
endif()
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)  # tests/static/headers_alone.py reads it

find_program(CCACHE ccache)
if(CCACHE AND NOT CMAKE_CXX_COMPILER_LAUNCHER)
  # The sloppiness that ccache asks for before it caches a unit with a precompiled header; and Python, which pip builds
  # with, sets a locale of its own
  set(CMAKE_CXX_COMPILER_LAUNCHER "${CMAKE_COMMAND}" -E env
      CCACHE_SLOPPINESS=pch_defines,time_macros,include_file_mtime,include_file_ctime,locale "${CCACHE}")
endif()

if(NOT TARGET headroom_training)
  return()
endif()

# torch/torch.h takes about 16 s a unit: compiled once for every program below, and once for the tests, whose units
# compile in half the time without optimisation. With -fpch-preprocess ccache can look into a unit that uses the header
file(CONFIGURE OUTPUT "${CMAKE_CURRENT_BINARY_DIR}/pch.cpp" CONTENT "")  # unlike WRITE it leaves an equal file alone
set(headroom_pch_options -fpch-preprocess)
set(headroom_test_pch_options -fpch-preprocess $<$<CONFIG:Release,Debug>:-O0>)
foreach(pch IN ITEMS headroom_pch headroom_test_pch)
  add_library(${pch} OBJECT EXCLUDE_FROM_ALL "${CMAKE_CURRENT_BINARY_DIR}/pch.cpp")
  target_link_libraries(${pch} PUBLIC headroom_training headroom_development)
  target_precompile_headers(${pch} PRIVATE <torch/torch.h>)
  target_compile_options(${pch} PRIVATE ${${pch}_options})
endforeach()

# headroom_share_pch(<name> <pch>): a target that uses the library and a shared precompiled header
function(headroom_share_pch name pch)
  target_link_libraries(${name} PRIVATE headroom_training headroom_development)
  target_compile_options(${name} PRIVATE ${${pch}_options})
  target_precompile_headers(${name} REUSE_FROM ${pch})
endfunction()

# So is what core/separate_kernels.hpp speaks of: more than a minute. Here all of it for this machine
add_library(headroom_kernels OBJECT kernels/torch.cpp)
headroom_share_pch(headroom_kernels headroom_pch)

# And models, trainer and planner, as long: once for all programs that call headroom_use_training(<name>)
file(CONFIGURE OUTPUT "${CMAKE_CURRENT_BINARY_DIR}/training.cpp" CONTENT
     "#define HEADROOM_TRAINING_HERE\n#include \"headroom/training.hpp\"\n")
add_library(headroom_separate_training OBJECT EXCLUDE_FROM_ALL "${CMAKE_CURRENT_BINARY_DIR}/training.cpp")
headroom_share_pch(headroom_separate_training headroom_pch)
function(headroom_use_training name)
  target_link_libraries(${name} PRIVATE headroom_separate_training)
endfunction()

# What uses LibTorch and a shared precompiled header: headroom_add_torch_program(<name> <source>...) and
# headroom_add_torch_tests(<name> <source>...)
function(headroom_add_torch_program name)
  add_executable(${name} ${ARGN})
  headroom_use_torch(${name} headroom_pch)
endfunction()
function(headroom_add_torch_tests name)
  add_executable(${name} ${ARGN})
  headroom_use_torch(${name} headroom_test_pch)
endfunction()
function(headroom_use_torch name pch)
  headroom_share_pch(${name} ${pch})
  target_link_libraries(${name} PRIVATE headroom_kernels)
endfunction()
