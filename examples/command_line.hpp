#pragma once

#include <c10/util/Exception.h>

#include <CLI/CLI.hpp>
#include <exception>
#include <iostream>

/// Runs a tool: exit code 2 for wrong arguments, 1 after an error, whose text it prints, else what `run` returns.
template <class Run>
int run_tool(const char* name, CLI::App& app, int argc, char** argv, Run&& run) {
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    return app.exit(e) == 0 ? 0 : 2;
  }
  try {
    return run();
  } catch (const c10::Error& e) {
    std::cerr << name << ": " << e.what_without_backtrace() << '\n';
  } catch (const std::exception& e) {
    std::cerr << name << ": " << e.what() << '\n';
  }
  return 1;
}
