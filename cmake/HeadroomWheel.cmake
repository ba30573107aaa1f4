# pip builds a wheel: for the PyTorch of the Python that it runs in, wherever others are.
find_package(Python3 REQUIRED COMPONENTS Interpreter)
execute_process(COMMAND "${Python3_EXECUTABLE}" -c
                        "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])"
                OUTPUT_VARIABLE torch OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET RESULT_VARIABLE failed)
if(failed)
  message(FATAL_ERROR
          "a wheel of headroom is built beside PyTorch, and ${Python3_EXECUTABLE} has none: pip install torch")
endif()
list(PREPEND CMAKE_PREFIX_PATH "${torch}")
