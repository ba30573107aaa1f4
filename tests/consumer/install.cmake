# Installs the build into `first`, moves it to `prefix`, and looks for paths of this machine in what was installed. With
# `component`, what is installed only where it is asked for comes along.
file(REMOVE_RECURSE "${first}" "${prefix}")
execute_process(COMMAND "${CMAKE_COMMAND}" --install "${build}" --prefix "${first}"
                OUTPUT_QUIET COMMAND_ERROR_IS_FATAL ANY)
if(component)
  execute_process(COMMAND "${CMAKE_COMMAND}" --install "${build}" --prefix "${first}" --component "${component}"
                  OUTPUT_QUIET COMMAND_ERROR_IS_FATAL ANY)
endif()
file(RENAME "${first}" "${prefix}")
file(GLOB_RECURSE installed "${prefix}/*")
list(FILTER installed EXCLUDE REGEX "\\.a$")  # with debug symbols it names the sources
if(NOT installed)
  message(FATAL_ERROR "nothing was installed")
endif()
foreach(file IN LISTS installed)
  file(READ "${file}" text)
  foreach(path IN ITEMS "${source}" "${build}" "${first}" torch/include /usr/)
    string(FIND "${text}" "${path}" at)
    if(NOT at EQUAL -1)
      message(SEND_ERROR "${file} holds a path of this machine: ${path}")
    endif()
  endforeach()
endforeach()
