# headroom::kernels: what takes long to compile, compiled once for all units of all programs. Attention in it is there
# for several instruction sets, of which a program takes the widest that its processor has (kernels/dispatch.cpp).
# Built where something links it; part of the whole build and of the installation where HEADROOM_COMPONENTS names it.
include(CheckCXXCompilerFlag)

# From the narrowest to the widest, as core/instruction_set.hpp calls them
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  set(headroom_sets sse2 avx2 avx512 avx512bf16 amx)
  set(headroom_flags_of_sse2 -march=x86-64)
  set(headroom_flags_of_avx2 -march=x86-64-v3)
  set(headroom_flags_of_avx512 -march=x86-64-v4)
  set(headroom_flags_of_avx512bf16 ${headroom_flags_of_avx512} -mavx512bf16)
  set(headroom_flags_of_amx ${headroom_flags_of_avx512bf16} -mamx-tile -mamx-bf16)
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "^(aarch64|arm64|ARM64)$")
  set(headroom_sets neon)
else()
  set(headroom_sets scalar)
endif()
set(HEADROOM_INSTRUCTION_SETS "${headroom_sets}" CACHE STRING
    "Instruction sets of headroom::kernels, from the narrowest on; the first is for every processor")

# A Debug build too has kernels at full speed, and vectors of one set in the code of none else: without optimisation the
# standard library's functions would be compiled as functions, and the linker would take one of them for all
function(headroom_add_kernel_objects name)
  add_library(${name} OBJECT EXCLUDE_FROM_ALL ${ARGN})
  target_link_libraries(${name} PRIVATE headroom_core)
  target_compile_options(${name} PRIVATE -O3)
  set_target_properties(${name} PROPERTIES POSITION_INDEPENDENT_CODE ON)
endfunction()

list(GET HEADROOM_INSTRUCTION_SETS 0 headroom_first_set)
headroom_add_kernel_objects(headroom_dispatch kernels/dispatch.cpp)
target_compile_options(headroom_dispatch PRIVATE ${headroom_flags_of_${headroom_first_set}})
set(headroom_kernel_objects headroom_dispatch)
foreach(set IN LISTS HEADROOM_INSTRUCTION_SETS)
  if(set MATCHES "^(avx512bf16|amx)$" AND CMAKE_CXX_COMPILER_ID STREQUAL Clang
     AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 19)
    continue()  # clang 16 itself crashes when it compiles those kernels; 19 does not
  endif()
  list(JOIN headroom_flags_of_${set} " " flags)
  check_cxx_compiler_flag("${flags}" HEADROOM_COMPILES_${set})
  if(HEADROOM_COMPILES_${set})
    headroom_add_kernel_objects(headroom_kernels_${set} kernels/instruction_set.cpp)
    target_compile_options(headroom_kernels_${set} PRIVATE ${headroom_flags_of_${set}})
    target_compile_definitions(headroom_kernels_${set} PRIVATE "HEADROOM_EXPECTED_ISA=\"${set}\"")
    list(APPEND headroom_kernel_objects headroom_kernels_${set})
    string(APPEND headroom_compiled_sets "HEADROOM_SET(${set}) ")
  endif()
endforeach()
target_compile_definitions(headroom_dispatch PRIVATE "HEADROOM_KERNEL_SETS=${headroom_compiled_sets}")
set(headroom_core_kernel_objects ${headroom_kernel_objects})

# What is compiled of the LibTorch tier is for every processor. A program that does not use that tier links none of it
if("headroom" IN_LIST HEADROOM_COMPONENTS)
  headroom_add_kernel_objects(headroom_kernels_torch kernels/torch.cpp)
  target_link_libraries(headroom_kernels_torch PRIVATE headroom_headroom)
  target_compile_definitions(headroom_kernels_torch PRIVATE HEADROOM_SEPARATE_KERNELS HEADROOM_KERNELS_AT_RUN_TIME)
  list(APPEND headroom_kernel_objects headroom_kernels_torch)
endif()

list(TRANSFORM headroom_kernel_objects REPLACE "(.+)" "$<TARGET_OBJECTS:\\1>" OUTPUT_VARIABLE objects)
add_library(headroom_compiled_kernels STATIC EXCLUDE_FROM_ALL ${objects})
add_library(headroom::kernels ALIAS headroom_compiled_kernels)
set_target_properties(headroom_compiled_kernels PROPERTIES EXPORT_NAME kernels OUTPUT_NAME headroom_kernels
                                                           LINKER_LANGUAGE CXX)
target_link_libraries(headroom_compiled_kernels INTERFACE headroom_core)
target_compile_definitions(headroom_compiled_kernels INTERFACE HEADROOM_SEPARATE_KERNELS)
set(headroom_if_asked_for EXCLUDE_FROM_ALL)
if("kernels" IN_LIST HEADROOM_COMPONENTS)
  set_target_properties(headroom_compiled_kernels PROPERTIES EXCLUDE_FROM_ALL OFF)
  set(headroom_if_asked_for "")
endif()
if(HEADROOM_INSTALL)
  install(TARGETS headroom_compiled_kernels EXPORT headroom_kernels
          ARCHIVE COMPONENT headroom_kernels ${headroom_if_asked_for})
  install(EXPORT headroom_kernels NAMESPACE headroom:: FILE headroom_kernels.cmake
          DESTINATION "${CMAKE_INSTALL_DATADIR}/cmake/headroom" COMPONENT headroom_kernels ${headroom_if_asked_for})
endif()
