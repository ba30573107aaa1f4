#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <numeric>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "headroom/core/error.hpp"
#include "headroom/plan/kernels/convolution.hpp"
#include "headroom/plan/kernels/recurrent.hpp"
#include "headroom/runtime/dry_run.hpp"

namespace headroom::inline v0 {

namespace detail::meta {

using at::IntArrayRef;
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Each kernel makes the tensors that the operator's CPU kernel makes, in its order, and computes nothing.

inline Tensor like(const Tensor& x) { return at::empty_like(x); }
inline Tensor like_contiguous(const Tensor& x) { return at::empty_like(x, {}, at::MemoryFormat::Contiguous); }
inline Tensor shaped(const Tensor& x, IntArrayRef sizes) { return at::empty(sizes, x.options()); }

inline Tensor broadcast(const Tensor& a, const Tensor& b, c10::ScalarType type) {
  return at::empty(at::infer_size(a.sizes(), b.sizes()), a.options().dtype(type));
}

/// The loss of an element-wise comparison: as large as the inputs, or a mean or sum of that.
inline Tensor loss(const Tensor& a, const Tensor& b, int64_t reduction) {
  const Tensor elements = broadcast(a, b, a.scalar_type());
  return reduction == at::Reduction::None ? elements : elements.sum();
}

inline std::vector<int64_t> reduced_sizes(const Tensor& x, at::OptionalIntArrayRef dims, bool keepdim) {
  std::vector<bool> gone(static_cast<size_t>(x.dim()), !dims.has_value() || dims->empty());
  if (dims.has_value()) {
    for (const int64_t d : *dims) gone[static_cast<size_t>(d < 0 ? d + x.dim() : d)] = true;
  }
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d < x.dim(); ++d) {
    if (!gone[static_cast<size_t>(d)]) sizes.push_back(x.size(d));
    if (gone[static_cast<size_t>(d)] && keepdim) sizes.push_back(1);
  }
  return sizes;
}
inline Tensor reduced(const Tensor& x, at::OptionalIntArrayRef dims, bool keepdim) {
  return at::empty(reduced_sizes(x, dims, keepdim), x.options().dtype(c10::toRealValueType(x.scalar_type())));
}

// ---- norms ----

/// Uninitialised statistics of a norm: float for narrow x, on the CPU only where the weight is float.
inline Tensor statistics(const Tensor& x, const OptionalTensor& weight, IntArrayRef sizes) {
  const bool wide =
      !compute_device(x).is_cpu() || (weight.has_value() && weight->defined() && weight->scalar_type() == at::kFloat);
  const bool widened = wide && c10::isReducedFloatingType(x.scalar_type());
  return at::empty(sizes, x.options().dtype(widened ? at::kFloat : x.scalar_type()));
}

inline std::tuple<Tensor, Tensor, Tensor> native_layer_norm(const Tensor& x, IntArrayRef normalized,
                                                            const OptionalTensor& weight, const OptionalTensor&,
                                                            double) {
  std::vector<int64_t> stats = x.sizes().vec();
  std::fill(stats.end() - static_cast<int64_t>(normalized.size()), stats.end(), 1);
  const Tensor dense = x.contiguous(), y = like_contiguous(dense);
  return {y, statistics(x, weight, stats), statistics(x, weight, stats)};
}

/// Partial sums of a thread each, as the CPU kernel makes them.
inline Tensor thread_sums(const Tensor& x, int64_t count) {
  return at::empty({2, at::get_num_threads(), count}, x.options());
}
inline Tensor wanted_like(bool wanted, const OptionalTensor& x) {
  return wanted && x.has_value() && x->defined() ? like_contiguous(*x) : Tensor();
}

inline std::tuple<Tensor, Tensor, Tensor> native_layer_norm_backward(const Tensor& grad, const Tensor& x,
                                                                     IntArrayRef normalized, const Tensor&,
                                                                     const Tensor&, const OptionalTensor& weight,
                                                                     const OptionalTensor& bias,
                                                                     std::array<bool, 3> wanted) {
  const Tensor dense = x.contiguous(), dense_grad = grad.contiguous();
  const Tensor dx = wanted[0] ? like_contiguous(dense) : Tensor();
  const Tensor dw = wanted_like(wanted[1], weight), db = wanted_like(wanted[2], bias);
  const Tensor sums = dw.defined() || db.defined() ? thread_sums(x, c10::multiply_integers(normalized)) : Tensor();
  return {dx, dw, db};
}

inline std::tuple<Tensor, Tensor, Tensor> native_group_norm(const Tensor& x, const OptionalTensor& weight,
                                                            const OptionalTensor&, int64_t n, int64_t, int64_t,
                                                            int64_t groups, double) {
  const Tensor dense = x.contiguous();
  const Tensor y = like_contiguous(dense);
  return {y, statistics(x, weight, {n, groups}), statistics(x, weight, {n, groups})};
}

inline std::tuple<Tensor, Tensor, Tensor> native_group_norm_backward(const Tensor& grad, const Tensor& x, const Tensor&,
                                                                     const Tensor&, const OptionalTensor& weight,
                                                                     int64_t n, int64_t c, int64_t, int64_t,
                                                                     std::array<bool, 3> wanted) {
  static_cast<void>(grad);
  const Tensor dx = wanted[0] ? like_contiguous(x) : Tensor();
  const Tensor dw = wanted_like(wanted[1], weight), db = wanted_like(wanted[2], weight);
  const Tensor ds = shaped(x, {n, c}), sums = shaped(x, {n, c});
  return {dx, dw, db};
}

inline std::tuple<Tensor, Tensor, Tensor> native_batch_norm(const Tensor& x, const OptionalTensor& weight,
                                                            const OptionalTensor&, const OptionalTensor&,
                                                            const OptionalTensor&, bool training, double, double) {
  const int64_t channels = training ? x.size(1) : 0;
  const Tensor y = like(x), mean = statistics(x, weight, {channels}), inverse = statistics(x, weight, {channels});
  return {y, mean, inverse};
}

inline std::tuple<Tensor, Tensor, Tensor> native_batch_norm_backward(const Tensor&, const Tensor& x,
                                                                     const OptionalTensor& weight,
                                                                     const OptionalTensor&, const OptionalTensor&,
                                                                     const OptionalTensor&, const OptionalTensor&, bool,
                                                                     double, std::array<bool, 3> wanted) {
  const Tensor stat = weight.has_value() && weight->defined() ? *weight : shaped(x, {x.size(1)});
  const Tensor dx = wanted[0] ? like(x) : Tensor();
  const Tensor dw = wanted[1] ? like_contiguous(stat) : Tensor(), db = wanted[2] ? like_contiguous(stat) : Tensor();
  const Tensor projection = wanted[0] ? like(x) : Tensor();
  return {dx, dw, db};
}

// ---- convolutions ----

inline Tensor convolution(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, IntArrayRef stride,
                          IntArrayRef padding, IntArrayRef dilation, bool transposed, IntArrayRef output_padding,
                          int64_t groups) {
  const bool has_bias = bias.has_value() && bias->defined();
  const ConvolutionOnCpu on_cpu{x, weight, has_bias, stride, padding, dilation, transposed, output_padding, groups};
  return compute_device(x).is_cpu() ? on_cpu.forward() : shaped(x, on_cpu.output_sizes(x.sizes()));
}

inline std::tuple<Tensor, Tensor, Tensor> convolution_backward(const Tensor& grad, const Tensor& x,
                                                               const Tensor& weight, at::OptionalIntArrayRef,
                                                               IntArrayRef stride, IntArrayRef padding,
                                                               IntArrayRef dilation, bool transposed,
                                                               IntArrayRef output_padding, int64_t groups,
                                                               std::array<bool, 3> wanted) {
  if (compute_device(x).is_cpu()) {
    return ConvolutionOnCpu{x, weight, wanted[2], stride, padding, dilation, transposed, output_padding, groups}
        .backward(grad, wanted);
  }
  const Tensor dense = grad.contiguous();
  return {wanted[0] ? like_contiguous(x) : Tensor(), wanted[1] ? like_contiguous(weight) : Tensor(),
          wanted[2] ? shaped(grad, {grad.size(1)}) : Tensor()};
}

// ---- Fourier transforms, as with MKL ----

/// How a transform of some dimensions goes through a tensor: the batch dimensions first, in the order of their strides,
/// and taken as one.
class TransformOrder {
 public:
  TransformOrder(const Tensor& x, IntArrayRef dims) : dims_(dims.vec()), order_(static_cast<size_t>(x.dim())) {
    for (int64_t& d : dims_) d = d < 0 ? d + x.dim() : d;
    std::iota(order_.begin(), order_.end(), 0);
    const auto is_batch = [&](int64_t d) { return std::find(dims_.begin(), dims_.end(), d) == dims_.end(); };
    const auto batch_end = std::stable_partition(order_.begin(), order_.end(), is_batch);
    std::stable_sort(order_.begin(), batch_end, [&](int64_t a, int64_t b) { return x.stride(a) > x.stride(b); });
    std::copy(dims_.begin(), dims_.end(), batch_end);
  }

  /// A copy where strides do not allow to take the batch dimensions as one.
  Tensor rows_of(const Tensor& x) const {
    std::vector<int64_t> sizes{-1};
    for (const int64_t d : dims_) sizes.push_back(x.size(d));
    return x.permute(order_).reshape(sizes);
  }
  /// A result of these sizes, which lies in memory in this order.
  Tensor result(IntArrayRef sizes, const at::TensorOptions& options) const {
    std::vector<int64_t> ordered, place(order_.size());
    for (size_t i = 0; i < order_.size(); ++i) {
      ordered.push_back(sizes[static_cast<size_t>(order_[i])]);
      place[static_cast<size_t>(order_[i])] = static_cast<int64_t>(i);
    }
    return at::empty(ordered, options).permute(place);
  }
  int64_t last() const { return dims_.back(); }

 private:
  std::vector<int64_t> dims_, order_;
};

inline Tensor fft_c2c(const Tensor& x, IntArrayRef dims, int64_t, bool) {
  if (dims.empty()) return x.clone();
  const TransformOrder order(x, dims);
  const Tensor out = order.result(x.sizes(), x.options());
  const Tensor rows = order.rows_of(x);
  return out;
}
inline Tensor fft_r2c(const Tensor& x, IntArrayRef dims, int64_t, bool onesided) {
  const TransformOrder order(x, dims);
  std::vector<int64_t> sizes = x.sizes().vec();
  if (onesided) sizes[static_cast<size_t>(order.last())] = x.size(order.last()) / 2 + 1;
  const Tensor out = order.result(sizes, x.options().dtype(c10::toComplexType(x.scalar_type())));
  const Tensor rows = order.rows_of(x);
  return out;
}
inline Tensor fft_c2r(const Tensor& x, IntArrayRef dims, int64_t normalization, int64_t last_size) {
  const Tensor input = dims.size() > 1 ? fft_c2c(x, dims.slice(0, dims.size() - 1), normalization, false) : x;
  const TransformOrder order(input, dims.slice(dims.size() - 1));
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes[static_cast<size_t>(order.last())] = last_size;
  const Tensor out = order.result(sizes, x.options().dtype(c10::toRealValueType(x.scalar_type())));
  const Tensor rows = order.rows_of(input);
  return out;
}

// ---- attention ----

/// Queries and keys that LibTorch's CPU kernel takes at a time.
inline std::pair<int64_t, int64_t> flash_tile(const Tensor& q, const Tensor& k) {
  const int64_t queries = q.size(2), rows = queries >= 768 ? 256 : queries >= 192 ? 64 : 32;
  return {std::min(rows, queries), std::min<int64_t>(512, k.size(2))};
}

inline std::tuple<Tensor, Tensor> flash_attention_for_cpu(const Tensor& q, const Tensor& k, const Tensor& v, double,
                                                          bool, const OptionalTensor&, std::optional<double>) {
  // [batch, heads, length, dim] that lies in memory as [batch, length, heads, dim]
  const auto type = q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const Tensor out = at::empty({q.size(0), q.size(2), q.size(1), v.size(3)}, q.options()).transpose(1, 2);
  const Tensor lse = at::empty({q.size(0), q.size(2), q.size(1)}, q.options().dtype(type)).transpose(1, 2);
  const auto [rows, columns] = flash_tile(q, k);
  const Tensor scratch = at::empty({at::get_num_threads(), rows * (columns + 2 + v.size(3))}, q.options().dtype(type));
  const bool narrow = q.scalar_type() != type;
  const Tensor weights = at::empty({at::get_num_threads(), rows, narrow ? columns : 0}, q.options());
  return {out, lse};
}
inline std::tuple<Tensor, Tensor, Tensor> flash_attention_for_cpu_backward(const Tensor&, const Tensor& q,
                                                                           const Tensor& k, const Tensor& v,
                                                                           const Tensor&, const Tensor&, double, bool,
                                                                           const OptionalTensor&,
                                                                           std::optional<double>) {
  const auto zeros = [](const Tensor& x) {
    return at::zeros({x.size(0), x.size(2), x.size(1), x.size(3)}, x.options()).transpose(1, 2);
  };
  const Tensor dq = zeros(q), dk = zeros(k), dv = zeros(v);
  const auto type = q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const auto [rows, columns] = flash_tile(q, k);
  const Tensor scratch = at::empty({at::get_num_threads(), 2 * rows * columns}, q.options().dtype(type));
  const Tensor delta = at::empty({at::get_num_threads(), rows}, q.options().dtype(type));  // one a thread
  const bool narrow = q.scalar_type() != type;
  const Tensor weights = at::empty({at::get_num_threads(), 2, rows, narrow ? columns : 0}, q.options());
  return {dq, dk, dv};
}

/// The kernels of CUDA: what they return and keep for backward. Their lse has rows for whole blocks of 32 queries.
inline std::tuple<Tensor, Tensor, Tensor, Tensor> efficient_attention(const Tensor& q, const Tensor&, const Tensor& v,
                                                                      const OptionalTensor&, bool with_lse, double,
                                                                      bool, std::optional<double>) {
  const int64_t rows = with_lse ? (q.size(2) + 31) / 32 * 32 : 0;
  const Tensor out = at::empty({q.size(0), q.size(2), q.size(1), v.size(3)}, q.options()).transpose(1, 2);
  const auto counter = at::empty({}, q.options().dtype(at::kLong));
  return {out, at::empty({q.size(0), q.size(1), rows}, q.options().dtype(at::kFloat)), counter, counter.clone()};
}
inline std::tuple<Tensor, Tensor, Tensor, Tensor> efficient_attention_backward(
    const Tensor&, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& bias, const Tensor&, const Tensor&,
    const Tensor&, const Tensor&, double, std::array<bool, 4> wanted, bool, std::optional<double>) {
  const auto grad = [](const Tensor& x) {
    return at::empty({x.size(0), x.size(2), x.size(1), x.size(3)}, x.options()).transpose(1, 2);
  };
  const Tensor delta = at::empty({q.size(0), q.size(1), q.size(2)}, q.options().dtype(at::kFloat));
  return {grad(q), grad(k), grad(v), wanted[3] && bias.defined() ? like(bias) : Tensor()};
}

// ---- indexing, padding, losses, activations ----

inline Tensor index_select(const Tensor& x, int64_t dim, const Tensor& index) {
  std::vector<int64_t> sizes = x.sizes().vec();
  if (!sizes.empty()) sizes[static_cast<size_t>(dim < 0 ? dim + x.dim() : dim)] = index.numel();
  return shaped(x, sizes);
}
inline Tensor embedding_dense_backward(const Tensor& grad, const Tensor& indices, int64_t count, int64_t, bool) {
  const Tensor dense = indices.contiguous();
  const Tensor rows = grad.reshape({indices.numel(), grad.size(-1)});
  return at::zeros({count, grad.size(-1)}, grad.options());
}
inline Tensor unfold_backward(const Tensor& grad, IntArrayRef sizes, int64_t dim, int64_t size, int64_t step) {
  const Tensor sum = at::zeros(sizes, grad.options());
  const int64_t reach = (grad.size(dim < 0 ? dim + grad.dim() - 1 : dim) - 1) * step + size;
  const Tensor positions = at::empty({reach}, grad.options().dtype(at::kLong));
  return sum;
}
inline Tensor padded_2d(const Tensor& x, IntArrayRef padding) {
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.end()[-1] += padding[0] + padding[1];
  sizes.end()[-2] += padding[2] + padding[3];
  return shaped(x, sizes);
}
inline Tensor abs(const Tensor& x) {
  return at::empty_like(x, x.options().dtype(c10::toRealValueType(x.scalar_type())));
}
inline Tensor complex(const Tensor& a, const Tensor& b) { return broadcast(a, b, c10::toComplexType(a.scalar_type())); }
inline Tensor where(const Tensor& condition, const Tensor& a, const Tensor& b) {
  const auto type = at::result_type(a, b);
  const Tensor left = a.scalar_type() == type ? a : a.to(type), right = b.scalar_type() == type ? b : b.to(type);
  return at::empty(at::infer_size(condition.sizes(), at::infer_size(a.sizes(), b.sizes())),
                   (a.dim() > 0 ? a : condition).options().dtype(type));
}
inline Tensor im2col(const Tensor& x, IntArrayRef kernel, IntArrayRef dilation, IntArrayRef padding,
                     IntArrayRef stride) {
  int64_t positions = 1;
  for (int64_t d = 0; d < 2; ++d) {
    const int64_t size = x.size(x.dim() - 2 + d);
    positions *=
        (size + 2 * at_dim(padding, d) - at_dim(dilation, d) * (at_dim(kernel, d) - 1) - 1) / at_dim(stride, d) + 1;
  }
  const int64_t columns = x.size(x.dim() - 3) * at_dim(kernel, 0) * at_dim(kernel, 1);
  const Tensor dense = x.contiguous(), y = like(x);  // resized, as LibTorch does
  return x.dim() == 4 ? y.resize_({x.size(0), columns, positions}) : y.resize_({columns, positions});
}
inline Tensor col2im(const Tensor& x, IntArrayRef output, IntArrayRef kernel, IntArrayRef, IntArrayRef, IntArrayRef) {
  const int64_t channels = x.size(x.dim() - 2) / (at_dim(kernel, 0) * at_dim(kernel, 1));
  const Tensor dense = x.contiguous(), y = like(x);
  return x.dim() == 3 ? y.resize_({x.size(0), channels, output[0], output[1]})
                      : y.resize_({channels, output[0], output[1]});
}

inline Tensor& resized(Tensor& out, IntArrayRef sizes) {
  if (out.sizes() != sizes) out.resize_(sizes);
  return out;
}

/// Of tensors without data only those are known to be equal that are the same.
inline bool equal(const Tensor& a, const Tensor& b) {
  return a.sizes() == b.sizes() && a.strides() == b.strides() && a.storage_offset() == b.storage_offset() &&
         a.storage().unsafeGetStorageImpl() == b.storage().unsafeGetStorageImpl();
}

/// What reading a value gives in this thread's dry run; none: it fails.
inline thread_local std::optional<double> value_read;
inline thread_local int64_t values_read = 0;

inline at::Scalar read_value(const Tensor& x) {
  require(value_read.has_value(), "headroom.memory.plan.values",
          "the step reads a value, as .item() and control flow that depends on data do: a ", x.scalar_type(),
          " tensor ", x.sizes(),
          " has no data while it is planned; take the reading out of the planned step, or say in "
          "PlanOptions::value what every reading shall give");
  ++values_read;
  return c10::isIntegralType(x.scalar_type(), true) ? at::Scalar(static_cast<int64_t>(*value_read))
                                                    : at::Scalar(*value_read);
}

/// Registers kernels while it lives, each where LibTorch has none of its own.
class Registration {
 public:
  Registration() : library_(torch::Library::IMPL, "aten", c10::DispatchKey::Meta, __FILE__, __LINE__) {
    norms();
    elementwise();
    shapes();
    library("_local_scalar_dense", &read_value);
    library("equal", &equal);
    RecurrentLayers::register_in(autograd_);
  }

 private:
  void norms() {
    library("native_layer_norm", &native_layer_norm);
    library("native_layer_norm_backward", &native_layer_norm_backward);
    library("native_group_norm", &native_group_norm);
    library("native_group_norm_backward", &native_group_norm_backward);
    library("native_batch_norm", &native_batch_norm);
    library("native_batch_norm_backward", &native_batch_norm_backward);
    library("convolution", &convolution);
    library("convolution_backward", &convolution_backward);
    library("mkldnn_rnn_layer", &LstmLayerOnCpu::forward);
    library("mkldnn_rnn_layer_backward", &LstmLayerOnCpu::backward);
    library("_fft_c2c", &fft_c2c);
    library("_fft_r2c", &fft_r2c);
    library("_fft_c2r", &fft_c2r);
    library("_scaled_dot_product_flash_attention_for_cpu", &flash_attention_for_cpu);
    library("_scaled_dot_product_flash_attention_for_cpu_backward", &flash_attention_for_cpu_backward);
    library("_scaled_dot_product_efficient_attention", &efficient_attention);
    library("_scaled_dot_product_efficient_attention_backward", &efficient_attention_backward);
  }

  void elementwise() {
    for (const char* name : {"relu", "hardswish", "isnan"}) {
      library(
          name, name == std::string("isnan") ? [](const Tensor& x) { return at::empty_like(x, at::kBool); }
                                             : [](const Tensor& x) { return like(x); });
    }
    library("abs", &abs);
    library("angle", &abs);
    for (const char* name : {"logical_and.out", "logical_or.out", "logical_xor.out"}) {
      library(name, [](const Tensor& a, const Tensor& b, Tensor& out) -> Tensor& {
        return resized(out, at::infer_size(a.sizes(), b.sizes()));
      });
    }
    library("nan_to_num.out",
            [](const Tensor& x, std::optional<double>, std::optional<double>, std::optional<double>,
               Tensor& out) -> Tensor& { return resized(out, x.sizes()); });
    library("logical_not.out", [](const Tensor& x, Tensor& out) -> Tensor& { return resized(out, x.sizes()); });
    library("complex", &complex);
    library("polar", &complex);
    library("where.self", &where);
    library("hardtanh", [](const Tensor& x, const at::Scalar&, const at::Scalar&) { return like(x); });
    library("hardtanh_backward",
            [](const Tensor&, const Tensor& x, const at::Scalar&, const at::Scalar&) { return like(x); });
    library("hardswish_backward", [](const Tensor&, const Tensor& x) { return like(x); });
    library("_prelu_kernel", [](const Tensor& x, const Tensor&) { return like(x); });
    library("_prelu_kernel_backward",
            [](const Tensor&, const Tensor& x, const Tensor&) { return std::tuple(like(x), like(x)); });
    library("log_sigmoid_forward", [](const Tensor& x) { return std::tuple(like(x), like(x)); });
    library("log_sigmoid_backward", [](const Tensor& grad, const Tensor&, const Tensor&) { return like(grad); });
    library("glu_backward", [](const Tensor&, const Tensor& x, int64_t) { return like(x); });
    library("mse_loss_backward", [](const Tensor&, const Tensor& x, const Tensor&, int64_t) { return like(x); });
    library("smooth_l1_loss_backward",
            [](const Tensor&, const Tensor& x, const Tensor&, int64_t, double) { return like(x); });
    library("huber_loss",
            [](const Tensor& a, const Tensor& b, int64_t reduction, double) { return loss(a, b, reduction); });
    library("huber_loss_backward",
            [](const Tensor&, const Tensor& x, const Tensor&, int64_t, double) { return like(x); });
    library("binary_cross_entropy", [](const Tensor& a, const Tensor& b, const OptionalTensor&, int64_t reduction) {
      // The reduced loss stays in the memory of the elements
      const Tensor elements = broadcast(a, b, a.scalar_type());
      if (reduction == at::Reduction::Mean) elements.mean(), elements.resize_({});
      if (reduction == at::Reduction::Sum) elements.sum(), elements.resize_({});
      return elements;
    });
    library("binary_cross_entropy_backward",
            [](const Tensor&, const Tensor& x, const Tensor&, const OptionalTensor&, int64_t) { return like(x); });
    library("native_dropout", [](const Tensor& x, double, std::optional<bool>) {
      return std::tuple(like(x), at::empty_like(x, at::kBool));
    });
    library("native_dropout_backward", [](const Tensor& grad, const Tensor&, double) { return like(grad); });
  }

  void shapes() {
    library("index_select", &index_select);
    library("bucketize.Tensor", [](const Tensor& x, const Tensor&, bool out_int32, bool) {
      return at::empty(x.sizes(), x.options().dtype(out_int32 ? at::kInt : at::kLong));
    });
    library("embedding_dense_backward", &embedding_dense_backward);
    library("unfold_backward", &unfold_backward);
    library("reflection_pad2d", &padded_2d);
    for (const char* name : {"reflection_pad2d_backward", "replication_pad2d_backward", "replication_pad3d_backward"}) {
      library(name, [](const Tensor&, const Tensor& x, IntArrayRef) { return at::zeros_like(x); });
    }
    library("im2col", &im2col);
    library("col2im", &col2im);
    library("repeat", [](const Tensor& x, IntArrayRef times) {
      std::vector<int64_t> sizes(times.begin(), times.end());
      for (int64_t d = 0; d < x.dim(); ++d) sizes[sizes.size() - static_cast<size_t>(x.dim() - d)] *= x.size(d);
      return shaped(x, sizes);
    });
    library("flip", [](const Tensor& x, IntArrayRef) { return like_contiguous(x); });
    library("roll", [](const Tensor& x, IntArrayRef, IntArrayRef) { return like_contiguous(x); });
    library("var.correction", [](const Tensor& x, at::OptionalIntArrayRef dims, const std::optional<at::Scalar>&,
                                 bool keepdim) { return reduced(x, dims, keepdim); });
    library("std.correction", [](const Tensor& x, at::OptionalIntArrayRef dims, const std::optional<at::Scalar>&,
                                 bool keepdim) { return reduced(x, dims, keepdim); });
    for (const char* name : {"var_mean.correction", "std_mean.correction"}) {
      library(name, [](const Tensor& x, at::OptionalIntArrayRef dims, const std::optional<at::Scalar>&, bool keepdim) {
        return std::tuple(reduced(x, dims, keepdim), reduced(x, dims, keepdim));
      });
    }
    for (const char* name : {"max", "min", "median"}) {
      library(name, [](const Tensor& x) { return shaped(x, {}); });
    }
    library("prod", [](const Tensor& x, std::optional<at::ScalarType> type) {
      return at::empty({}, x.options().dtype(type.value_or(x.scalar_type())));
    });
    library("dot", [](const Tensor& x, const Tensor&) { return shaped(x, {}); });
  }

  /// "name" or "name.overload".
  template <class F>
  void library(const char* name, F&& kernel) {
    const std::string full = std::string("aten::") + name;
    const size_t dot = full.find('.');
    const auto handle = c10::Dispatcher::singleton().findSchema(
        {full.substr(0, dot), dot == std::string::npos ? "" : full.substr(dot + 1)});
    if (handle.has_value() && !handle->hasKernelForDispatchKey(c10::DispatchKey::Meta)) {
      library_.impl(name, std::forward<F>(kernel));
    }
  }

  torch::Library library_;
  torch::Library autograd_{torch::Library::IMPL, "aten", c10::DispatchKey::AutogradMeta, __FILE__, __LINE__};
};

}  // namespace detail::meta

/// While it lives, operators that LibTorch implements for the meta device in Python only, or not at all, have kernels
/// there. They compute shapes and make the tensors that the CPU's kernels make, temporary ones included. Scopes nest;
/// plan() opens one by itself.
///
/// An operator that is still missing is registered like this, before planning:
///
///     TORCH_LIBRARY_IMPL(aten, Meta, m) {
///       m.impl("bincount", [](const Tensor& x, const std::optional<Tensor>&, int64_t least) { return …; });
///     }
class MetaKernels {
 public:
  MetaKernels() {
    const std::scoped_lock lock(mutex());
    std::shared_ptr<detail::meta::Registration> shared = current().lock();
    if (shared == nullptr) current() = shared = std::make_shared<detail::meta::Registration>();
    registration_ = std::move(shared);
  }
  ~MetaKernels() {
    const std::scoped_lock lock(mutex());
    registration_.reset();
  }
  MetaKernels(const MetaKernels&) = delete;
  MetaKernels& operator=(const MetaKernels&) = delete;

 private:
  static std::mutex& mutex() {
    static std::mutex mutex;
    return mutex;
  }
  static std::weak_ptr<detail::meta::Registration>& current() {
    static std::weak_ptr<detail::meta::Registration> registration;
    return registration;
  }

  std::shared_ptr<detail::meta::Registration> registration_;
};

}  // namespace headroom::inline v0
