#pragma once

#include <limits>

#include "headroom/core/attention/problem.hpp"
#include "headroom/core/error.hpp"

/// What the entries of attention ask of their arguments.
namespace headroom::inline v0::core::detail {

inline void check_shape(const char* name, const std::array<Index, 4>& given, const std::array<Index, 4>& expected) {
  require(given == expected, "headroom.core.attention.shape", name, " has shape ", Shape{given}, ", expected ",
          Shape{expected}, " from the shapes of q [B,H,Lq,D], k [B,Hk,Lk,D] and v [B,Hk,Lk,Dv]");
}

/// Fails unless the tensors that are added to scores, and the masks, fit q and k.
inline void check_score_shapes(const ForwardProblem& x, const AttentionParams& params) {
  const auto [batch, heads, queries, dim] = x.q.shape;
  const Index keys = x.k.length();
  if (params.bias) check_shape("bias", params.bias.shape, {batch, heads, queries, keys});
  if (params.mask.data != nullptr) check_shape("mask", params.mask.shape, {batch, heads, queries, keys});
  if (params.slopes) check_shape("slopes", params.slopes.shape, {batch, heads, queries, 1});
  if (params.sink) check_shape("sink", params.sink.shape, {1, heads, 1, 1});
  if (params.relative_bias) {
    check_shape("relative_bias", params.relative_bias.shape, {1, heads, 1, params.relative_bias.dim()});
    require(params.relative_bias.dim() % 2 == 1, "headroom.core.attention.shape", "relative_bias has ",
            params.relative_bias.dim(), " elements a head, expected an odd number, 2R-1");
  }
  if (params.block_mask.data != nullptr) {
    const Index size = params.block_size;
    require(size > 0, "headroom.core.attention.shape", "block_size is ", size, ", expected a positive number");
    const auto blocks = [&](Index length) { return length / size + (length % size != 0); };
    check_shape("block_mask", params.block_mask.shape, {batch, heads, blocks(queries), blocks(keys)});
  }
}

/// Fails unless the tables of the score function are there, of the type that is computed in.
inline void check_functions(const ForwardProblem& x, const AttentionParams& params) {
  const StoredType computed_in = x.q.type == StoredType::float64 ? StoredType::float64 : StoredType::float32;
  const auto name = [](StoredType type) {
    return type == StoredType::float64 ? "double" : type == StoredType::float32 ? "float" : "16 bits";
  };
  for (Index i = 0; i < params.score_function.tables(); ++i) {
    const ScoreTable& table = params.score_function.table(i);
    require(table.data != nullptr && table.rows > 0 && table.columns > 0 && table.type == computed_in,
            "headroom.core.attention.score_function", "table ", i, " of the score function has ", table.rows, " x ",
            table.columns, " elements of ", name(table.type), "; expected at least one, of ", name(computed_in),
            ", which is computed in");
  }
  // Functions are told where queries and keys stand in numbers of type float
  require(!params.has_functions() || x.q.length() < (Index(1) << 24), "headroom.core.attention.length", "q has ",
          x.q.length(), " positions, at most 2^24 are supported with functions of one's own");
}

/// Fails unless tiles of kernels with so many floats in a vector are whole vectors where functions were compiled.
inline void check_lanes(const AttentionParams& params, int lanes, const char* instruction_set) {
  require(params.function_lanes() <= lanes, "headroom.core.attention.lanes",
          "a score or mask function was compiled for vectors of ", params.function_lanes(), " floats, and kernels for ",
          instruction_set, " have vectors of ", lanes, "; compile the unit of the function with narrower vectors, or ",
          "let the kernels have wider ones");
}

/// Whether a table of position embedding has a row for every position, and numbers of the type that is computed in next
/// to each other.
inline bool serves_positions(const StoredTensor& table, const ForwardProblem& x, const AttentionParams& params) {
  const auto exists = [&](Index row) { return 0 <= row && row < table.length(); };
  bool rows_exist = true;
  for (Index i = 0; i < x.q.length(); ++i) rows_exist &= exists(params.table_row_of_query(i));
  for (Index j = 0; j < x.k.length(); ++j) rows_exist &= exists(params.table_row_of_key(j));
  const bool narrow = x.q.type != StoredType::float64;
  return rows_exist && (table.strides[3] == 1 || table.dim() == 0) &&
         table.type == (narrow ? StoredType::float32 : StoredType::float64);
}
/// Fails unless the tables of rotary and polar embedding fit q and k.
inline void check_positions(const ForwardProblem& x, const AttentionParams& params) {
  const StoredTensor &rotary = params.rotary, &polar = params.polar;
  const Index dim = x.q.dim();
  require(!rotary || (serves_positions(rotary, x, params) && rotary.dim() % 2 == 0 && rotary.dim() <= dim),
          "headroom.core.attention.shape", "the rotary table ", Shape{rotary.shape},
          " does not fit; expected [1,1,rows,2·pairs] of the type that is computed in, with at most D = ", dim,
          " columns next to each other and a row for every position");
  require(!polar || (serves_positions(polar, x, params) && polar.dim() == 2 * dim), "headroom.core.attention.shape",
          "the polar table ", Shape{polar.shape}, " does not fit; expected [1,1,rows,", 2 * dim,
          "] of the type that is computed in, with columns next to each other and a row for every position");
  require(!rotary || !polar, "headroom.core.attention.shape",
          "rotary and polar tables are both given; expected one of them");
  if (!params.polar_phase) return;
  check_shape("polar_phase", params.polar_phase.shape, {1, x.k.shape[1], 1, 2 * dim});
  require(
      params.polar && (params.polar_phase.strides[3] == 1 || dim == 0) && params.polar_phase.type == params.polar.type,
      "headroom.core.attention.shape",
      "polar_phase does not fit; expected a polar table beside it, of the same type, and columns next to each "
      "other");
}

/// Fails unless q [B,H,Lq,D], k [B or 1,Hk,Lk,D], v [B or 1,Hk,Lk,Dv], output [B,H,Lq,Dv], lse [B,H,Lq,1] and all of
/// `params` agree.
inline void check_problem(const ForwardProblem& x, const AttentionParams& params) {
  const auto [batch, heads, queries, dim] = x.q.shape;
  const Index keys = x.k.length(), k_batch = x.k.shape[0] == 1 ? 1 : batch, k_heads = x.k.shape[1];
  require(heads == k_heads || (k_heads > 0 && heads % k_heads == 0), "headroom.core.attention.shape", "k has ", k_heads,
          " heads, expected a divisor of the ", heads, " heads of q");
  check_shape("k", x.k.shape, {k_batch, k_heads, keys, dim});
  check_shape("v", x.v.shape, {k_batch, k_heads, keys, x.v.dim()});
  check_shape("the output", x.output.shape, {batch, heads, queries, x.v.dim()});
  if (x.lse.data != nullptr) check_shape("lse", x.lse.shape, {batch, heads, queries, 1});
  check_score_shapes(x, params);
  check_positions(x, params);
  check_functions(x, params);
  const double scale = params.scale_for(dim);
  require(std::abs(scale) <= std::numeric_limits<float>::max(), "headroom.core.attention.scale", "scale is ", scale,
          ", expected a finite number");
  require(params.dropout.probability >= 0 && params.dropout.probability < 1, "headroom.core.attention.dropout",
          "dropout is ", params.dropout.probability, ", expected a probability below 1");
  // Positions are compared as floats, which hold whole numbers up to 2^24.
  require(keys < (Index(1) << 24), "headroom.core.attention.length", "k has ", keys,
          " positions, at most 2^24 are supported");
}

/// Fails unless the gradients have the shapes of what they belong to.
inline void check_gradients(const BackwardProblem& x, const AttentionParams& params) {
  require((x.lse.data != nullptr || x.q.shape[0] * x.q.shape[1] * x.q.shape[2] == 0) &&
              x.grad_output.shape == x.output.shape && x.grad_q.shape == x.q.shape && x.grad_k.shape == x.k.shape &&
              x.grad_v.shape == x.v.shape,
          "headroom.core.attention.shape", "grad_output ", Shape{x.grad_output.shape}, ", grad_q ",
          Shape{x.grad_q.shape}, ", grad_k ", Shape{x.grad_k.shape}, " and grad_v ", Shape{x.grad_v.shape},
          " must have the shapes of the output ", Shape{x.output.shape}, ", q ", Shape{x.q.shape}, ", k ",
          Shape{x.k.shape}, " and v ", Shape{x.v.shape}, ", and lse must be given");
  const TensorView<double>& tables = x.param_grads.score_tables;
  require(tables.data == nullptr || tables.dim() == params.score_function.table_size(), "headroom.core.attention.shape",
          "the gradient of the score function's tables has ", tables.dim(), " elements, the tables have ",
          params.score_function.table_size());
  const TensorView<double>& phase = x.param_grads.polar_phase;
  require(phase.data == nullptr || params.polar, "headroom.core.attention.shape",
          "a gradient of polar_phase is asked for, and there is no polar table");
  if (phase.data != nullptr) check_shape("the gradient of polar_phase", phase.shape, {1, x.k.shape[1], 1, x.q.dim()});
}

/// Fails when elements of a tensor that is written to share memory.
inline void check_writable(const char* name, const StoredTensor& x) {
  for (std::size_t d = 0; d < 4; ++d) {
    require(x.strides[d] != 0 || x.shape[d] <= 1 || x.size() == 0, "headroom.core.attention.output", name, " ",
            Shape{x.shape}, " is expanded: its elements share memory; give it memory of its own");
  }
}

}  // namespace headroom::inline v0::core::detail
