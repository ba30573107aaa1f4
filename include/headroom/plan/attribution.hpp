#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <string>
#include <string_view>
#include <vector>

#include "headroom/plan/trace.hpp"

namespace headroom::inline v0::detail {

/// An operator that uses parameters or buffers.
struct ParameterUser {
  int32_t op;                    ///< in MemoryTrace::operators
  std::vector<int32_t> modules;  ///< whose they are: in MemoryTrace::names
};

/// Gives each operator of a trace its module. C++ modules have no hooks: an operator that uses parameters belongs to
/// what their modules have in common. Another one belongs to its caller, or lies between two that use some: to the
/// deepest module that has both of these in it. `users` come in the order of their calls.
inline void attribute_operators(MemoryTrace& trace, NameTable& name, const std::deque<ParameterUser>& users) {
  const auto path = [&](int32_t module) -> std::string_view { return trace.names[static_cast<size_t>(module)]; };
  const auto common = [&](const std::vector<int32_t>& modules) {
    std::string_view all = path(modules.front());
    for (const int32_t module : modules) all = MemoryTrace::common_path(all, path(module));
    return name(std::string(all));
  };
  const auto nearest_common = [&](const std::vector<int32_t>& before, const std::vector<int32_t>& after) {
    std::string_view deepest;
    for (const int32_t a : before) {
      for (const int32_t b : after) {
        const std::string_view shared = MemoryTrace::common_path(path(a), path(b));
        if (shared.size() > deepest.size()) deepest = shared;
      }
    }
    return name(std::string(deepest));
  };
  auto user = users.begin();   // the next one
  int32_t between = name("");  // the module of what lies between the one before and that one
  for (size_t i = 0; i < trace.operators.size(); ++i) {
    MemoryTrace::Operator& op = trace.operators[i];
    if (user != users.end() && user->op == static_cast<int32_t>(i)) {
      op.module = common(user->modules);
      const auto& before = user->modules;
      between = ++user == users.end() ? name("") : nearest_common(before, user->modules);
      continue;
    }
    op.module = between;
    if (op.parent < 0) continue;
    // Not from a node of the graph: within it a checkpoint may run a whole forward pass
    const MemoryTrace::Operator& caller = trace.operators[static_cast<size_t>(op.parent)];
    if (!caller.is_node && !path(caller.module).empty()) op.module = caller.module;
  }
}

/// Gives each block of a trace the module of its operator, a shape, and its use where that is not known yet: by the
/// operator that asked for it and the phases in which it came and went.
inline void attribute_blocks(MemoryTrace& trace, NameTable& name) {
  const int32_t workspace = name("headroom::workspace"), optimizer = name("optimizer"), backward = name("backward");
  const auto caller_of = [&](int32_t op) { return op < 0 ? -1 : trace.operators[static_cast<size_t>(op)].parent; };
  const auto is_workspace = [&](int32_t op) {
    return op >= 0 && trace.operators[static_cast<size_t>(op)].name == workspace;
  };
  for (MemoryTrace::Block& block : trace.blocks) {
    if (block.shape.empty()) block.shape = {block.bytes};
    if (block.module < 0) {
      block.module = block.op >= 0 ? trace.operators[static_cast<size_t>(block.op)].module : name("");
    }
    if (block.use != MemoryUse::temporary) continue;
    const bool outlives_its_phase = block.end_phase != block.phase;
    if (is_workspace(block.op) || is_workspace(caller_of(block.op))) {
      block.use = MemoryUse::workspace;
    } else if (block.phase == optimizer && outlives_its_phase) {
      block.use = MemoryUse::optimizer;
    } else if (block.phase != backward && outlives_its_phase) {
      block.use = MemoryUse::activation;
    }
  }
}

}  // namespace headroom::inline v0::detail
