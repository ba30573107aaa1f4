# Defines the target `torch`. Looks at Torch_DIR, CMAKE_PREFIX_PATH, then this checkout's .venv.
if(NOT TARGET torch)
  file(GLOB venv_torch "${PROJECT_SOURCE_DIR}/.venv/lib/python3*/site-packages/torch/share/cmake/Torch")
  find_package(Torch REQUIRED HINTS ${venv_torch})
endif()
