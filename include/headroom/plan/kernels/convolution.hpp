#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/native/ConvUtils.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "headroom/plan/flops.hpp"
#include "headroom/plan/kernels/probe.hpp"
#include "headroom/plan/kernels/registry.hpp"
#include "headroom/runtime/dry_run.hpp"

namespace headroom::inline v0::detail::meta {

/// A convolution of a dry run that stands for the CPU. oneDNN copies tensors into layouts that it chooses for the
/// processor and the sizes, and takes workspace for as many threads as it uses. It is asked by running it:
/// - Small convolutions run as they are.
/// - Of others a tiny one runs, which shows the order of allocations. Then the real one starts and is stopped at the
///   last allocation before it would compute: that shows their sizes. Of large ones that is done with a part of the
///   batch, and what grows with it is scaled.
class ConvolutionOnCpu {
 public:
  at::Tensor x, weight;
  bool has_bias;
  at::IntArrayRef stride, padding, dilation;
  bool transposed;
  at::IntArrayRef output_padding;
  int64_t groups;

  int64_t channels() const { return transposed ? weight.size(1) * groups : weight.size(0); }
  std::vector<int64_t> output_sizes(at::IntArrayRef sizes) const {
    std::vector<int64_t> out{sizes[0], channels()};
    for (size_t d = 2; d < sizes.size(); ++d) {
      const int64_t reach = at_dim(dilation, d - 2) * (weight.size(static_cast<int64_t>(d)) - 1) + 1;
      const int64_t step = at_dim(stride, d - 2), margin = 2 * at_dim(padding, d - 2);
      out.push_back(transposed ? (sizes[d] - 1) * step - margin + reach + at_dim(output_padding, d - 2)
                               : (sizes[d] + margin - reach) / step + 1);
    }
    return out;
  }

  at::Tensor forward() const { return replay({{}, {}})[0]; }
  std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(const at::Tensor& grad, std::array<bool, 3> wanted) const {
    std::vector<at::Tensor> made(3);
    if (script_of({grad, wanted}).has_value()) {
      made = replay({grad, wanted});
    } else {  // oneDNN makes gradients of the input before it begins with those of the weight
      if (wanted[0]) made[0] = replay({grad, {true, false, false}})[0];
      if (wanted[1] || wanted[2]) {
        const auto parameters = replay({grad, {false, true, wanted[2]}});
        std::copy(parameters.begin() + 1, parameters.end(), made.begin() + 1);
      }
    }
    return {made[0], made[1], made[2]};
  }

 private:
  static constexpr double kSmall = 1 << 24;            // operations that cost no time worth saving
  static constexpr int64_t kRoom = int64_t{16} << 20;  // bytes of input and output that a probe may copy

  using Sizes = std::vector<int64_t>;
  using Backend = at::native::ConvBackend;

  /// What is computed: the output or, with a gradient of it, the wanted ones of input, weight and bias.
  struct Pass {
    at::Tensor grad;
    std::array<bool, 3> wanted;

    bool is_forward() const { return !grad.defined(); }
    bool is_of_weight() const { return !is_forward() && !wanted[0]; }
    bool is_whole() const { return is_forward() || !(wanted[0] && (wanted[1] || wanted[2])); }
  };

  /// Sizes of the results of a pass over an input of these sizes.
  std::vector<Sizes> results(const Pass& pass, at::IntArrayRef sizes) const {
    if (pass.is_forward()) return {output_sizes(sizes)};
    return {sizes.vec(), weight.sizes().vec(), {channels()}};
  }

  std::optional<AllocationScript> script_of(const Pass& pass) const {
    const std::string key =
        c10::str("convolution", x.sizes(), x.strides(), weight.sizes(), weight.strides(), x.scalar_type(), has_bias,
                 stride, padding, dilation, transposed, output_padding, groups, pass.wanted[0], pass.wanted[1],
                 pass.wanted[2], pass.is_forward() ? at::IntArrayRef() : pass.grad.strides(), at::get_num_threads(),
                 at::globalContext().userEnabledMkldnn());
    return probed_script(key, [&] { return probe(pass); });
  }
  std::vector<at::Tensor> replay(const Pass& pass) const {
    const auto script = script_of(pass);
    const std::vector<Sizes> sizes = results(pass, x.sizes());
    const auto make = [&](size_t i, at::MemoryFormat format) {
      return at::empty(sizes[i], x.options().requires_grad(false).memory_format(format));
    };
    if (!script.has_value() || script->is_estimate) estimated.insert("aten::convolution");
    return script.has_value() ? script->replay(make) : estimate(pass, sizes, make);
  }

  /// Every window of the input beside the results, which is the most that a kernel needs that is not oneDNN's.
  template <class Make>
  std::vector<at::Tensor> estimate(const Pass& pass, const std::vector<Sizes>& sizes, const Make& make) const {
    const auto windows = static_cast<int64_t>(flops(x.sizes()) / 2) / weight.size(0);
    const at::Tensor columns = at::empty({windows}, x.options().requires_grad(false));
    std::vector<at::Tensor> made(sizes.size());
    for (size_t i = 0; i < sizes.size(); ++i) {
      if (pass.is_forward() || pass.wanted[i]) made[i] = make(i, at::MemoryFormat::Contiguous);
    }
    return made;
  }

  double flops(at::IntArrayRef sizes) const {
    return convolution_flops({sizes, weight.sizes(), stride, padding, dilation, transposed});
  }

  /// Inputs of a spatial dimension that make four outputs, or the other way round.
  int64_t least(size_t d) const {
    const int64_t reach = at_dim(dilation, d - 2) * (weight.size(static_cast<int64_t>(d)) - 1) + 1,
                  margin = 2 * at_dim(padding, d - 2);
    return std::max<int64_t>(transposed ? 4 + margin : reach + 3 * at_dim(stride, d - 2) - margin, 1);
  }
  /// Sizes of an input that is soon computed: halved in all directions until it is.
  Sizes tiny_sizes(int64_t samples) const {
    Sizes sizes = x.sizes().vec();
    sizes[0] = samples;
    for (bool smaller = true; smaller && flops(sizes) > kSmall;) {
      smaller = false;
      for (size_t d = 2; d < sizes.size(); ++d) {
        const int64_t half = std::min(std::max(sizes[d] / 2, least(d)), sizes[d]);
        smaller = smaller || half < sizes[d];
        sizes[d] = half;
      }
    }
    return sizes;
  }
  /// Sizes of an input of which copies have room: fewer samples or, if that does not do, fewer rows. Up to the
  /// number of threads, workspace depends on that of samples.
  Sizes cut_sizes() const {
    Sizes sizes = x.sizes().vec();
    const int64_t few = std::max<int64_t>(2, at::get_num_threads());
    const auto bytes_of = [&](const Sizes& some) {
      return static_cast<int64_t>(x.element_size()) *
             (c10::multiply_integers(some) + c10::multiply_integers(output_sizes(some)));
    };
    const int64_t samples = std::max(kRoom * sizes[0] / bytes_of(sizes) / few, int64_t{1}) * few;  // a share for each
    sizes[0] = std::min(samples, sizes[0]);
    if (const int64_t bytes = bytes_of(sizes); bytes > 2 * kRoom) {
      int64_t& rows = sizes[rows_dim()];
      const int64_t wanted = std::max(2 * kRoom * rows / bytes, std::min(rows, least(rows_dim())));
      rows -= (rows - wanted) / at_dim(stride, rows_dim() - 2) * at_dim(stride, rows_dim() - 2);
    }
    return sizes;
  }
  size_t rows_dim() const {
    return static_cast<size_t>(std::max_element(x.sizes().begin() + 2, x.sizes().end()) - x.sizes().begin());
  }

  /// Real tensors for a convolution like this one, of an input of other sizes.
  class Problem {
   public:
    Problem(const ConvolutionOnCpu& like, const Pass& pass, at::IntArrayRef sizes, bool zeros)
        : like_(like),
          x_(stand_in(like.x, sizes, zeros)),
          weight_(stand_in(like.weight, like.weight.sizes(), zeros)),
          bias_(at::zeros({like.channels()}, x_.options())) {
      if (!pass.is_forward()) grad_ = stand_in(pass.grad, like.output_sizes(sizes), zeros);
    }

    Backend backend() const {
      const auto symbols = [](at::IntArrayRef list) { return c10::fromIntArrayRefSlow(list); };
      return at::native::select_conv_backend(x_, weight_, bias(), symbols(like_.stride), symbols(like_.padding),
                                             symbols(like_.dilation), like_.transposed, symbols(like_.output_padding),
                                             like_.groups, std::nullopt);
    }

    /// The output, or the wanted gradients.
    AllocationScript record(KernelProbe& probe, std::array<bool, 3> wanted, KernelProbe::Stop stop = {}) const {
      const ConvolutionOnCpu& c = like_;
      const auto run = [&]() -> std::vector<at::Tensor> {
        if (!grad_.defined()) {
          return {at::convolution(x_, weight_, bias(), c.stride, c.padding, c.dilation, c.transposed, c.output_padding,
                                  c.groups)};
        }
        const auto [dx, dw, db] =
            at::convolution_backward(grad_, x_, weight_, at::OptionalIntArrayRef(c.channels()), c.stride, c.padding,
                                     c.dilation, c.transposed, c.output_padding, c.groups, wanted);
        return {dx, dw, db};
      };
      return probe.record(run, std::move(stop));
    }

   private:
    std::optional<at::Tensor> bias() const { return like_.has_bias ? std::optional(bias_) : std::nullopt; }

    const ConvolutionOnCpu& like_;
    at::Tensor x_, weight_, bias_, grad_;
  };

  /// None: it is too large to be run, and smaller ones or both parts of backward at once do not tell.
  std::optional<AllocationScript> probe(const Pass& pass) const {
    KernelProbe probe;
    const auto record = [&](const Sizes& sizes) {
      return Problem(*this, pass, sizes, true).record(probe, pass.wanted);
    };
    const auto backend = [&](const Sizes& sizes) { return Problem(*this, pass, sizes, false).backend(); };
    if (flops(x.sizes()) <= kSmall) return record(x.sizes().vec());
    const Backend real = backend(cut_sizes());
    if (real != Backend::Mkldnn && real != Backend::MkldnnTranspose) return extrapolate(record);
    if (!pass.is_whole()) return std::nullopt;
    for (const int64_t samples : {2, 16}) {  // few are not always enough for oneDNN to be chosen
      if (backend(tiny_sizes(samples)) == real) return enlarge(probe, pass, tiny_sizes(samples));
    }
    return std::nullopt;
  }

  /// For kernels that do not choose by size. What they allocate is linear in the number of samples and in that of rows:
  /// one and two samples of a few and some more rows tell.
  template <class Record>
  std::optional<AllocationScript> extrapolate(const Record& record) const {
    const size_t dim = rows_dim();
    const int64_t all = x.size(static_cast<int64_t>(dim)), step = at_dim(stride, dim - 2);
    const int64_t few = least(dim) + (all - least(dim)) % step, more = few + 4 * step;
    const auto sizes = [&](int64_t samples, int64_t rows) {
      Sizes some = x.sizes().vec();
      some[0] = samples;
      some[dim] = rows;
      return some;
    };
    const int64_t samples = std::min<int64_t>(x.size(0), 2);
    if (more > all || flops(sizes(samples, more)) > 16 * kSmall) return std::nullopt;
    AllocationScript script = record(sizes(1, few));
    const auto taller = record(sizes(1, more)), twice = record(sizes(samples, few)),
               both = record(sizes(samples, more));
    for (const AllocationScript* other : {&taller, &twice, &both}) {
      if (other->bytes.size() != script.bytes.size() || other->events.size() != script.events.size()) return {};
    }
    for (size_t i = 0; i < script.bytes.size(); ++i) {
      const int64_t base = script.bytes[i], of_rows = taller.bytes[i] - base, of_sample = twice.bytes[i] - base;
      const int64_t of_both = both.bytes[i] - base - of_rows - of_sample, times = x.size(0) - 1;
      script.bytes[i] += of_sample * times + (of_rows + of_both * times) * (all - few) / (more - few);
    }
    return script;
  }

  /// How many blocks oneDNN has allocated when it computes. Then it frees some; a weight has gradients made before
  /// that.
  static size_t before_computing(const AllocationScript& script, const Pass& pass) {
    return pass.is_of_weight() ? std::min(*script.results[1].block, *script.results[2].block) : script.before_release();
  }

  /// Whether threads share samples, and sum a weight's gradient each, rather than channels: oneDNN does so if input and
  /// output have about 8 times the elements of the weight.
  bool sums_in_parts(at::IntArrayRef sizes, int64_t factor) const {
    int64_t input = c10::multiply_integers(sizes), output = c10::multiply_integers(output_sizes(sizes));
    for (size_t d = 2; d < sizes.size(); ++d) (transposed ? output : input) /= at_dim(stride, d - 2);
    return std::min(input, output) > factor * weight.numel();
  }

  /// The script of a tiny problem with the bytes of this one.
  AllocationScript enlarge(KernelProbe& probe, const Pass& pass, const Sizes& tiny) const {
    // Gradients of weights are asked for with that of a bias, which oneDNN makes last before it computes
    std::array<bool, 3> wanted = pass.wanted;
    wanted[2] = pass.is_of_weight();
    AllocationScript script = Problem(*this, pass, tiny, true).record(probe, wanted);
    const size_t ahead = before_computing(script, pass);
    enlarge_results(script, results(pass, x.sizes()), ahead);
    const auto asked_for = [&](const Sizes& part) {
      // Workspace may come with the size, in front of the gradient of the bias
      const auto is_last = [&](size_t i, int64_t bytes) {
        return i == ahead || (i + 1 == ahead && (!pass.is_of_weight() || bytes == script.bytes[i]));
      };
      return Problem(*this, pass, part, false).record(probe, wanted, is_last).bytes;
    };
    const Sizes part = cut_sizes();
    std::vector<int64_t> bytes = asked_for(part);
    if (bytes.size() > ahead) script.insert_around(ahead - 1, 0);
    script.is_estimate = part != x.sizes();
    if (pass.is_of_weight() && sums_in_parts(x.sizes(), 6) && !sums_in_parts(part, 8)) {
      const int64_t sums = std::min<int64_t>(x.size(0), at::get_num_threads()) - 1;
      bytes.insert(bytes.end() - 1, sums * weight.numel() * static_cast<int64_t>(x.element_size()));
      script.insert_around(bytes.size() - 2, 0);
    }
    const auto asked_for_half = [&](size_t dim, int64_t half) {
      Sizes sizes = part;
      sizes[dim] = half;
      std::vector<int64_t> some = asked_for(sizes);
      while (some.size() < bytes.size()) some.insert(some.end() - 1, 0);
      return some;
    };
    scale_up(bytes, pass, part, asked_for_half);
    std::copy(bytes.begin(), bytes.end(), script.bytes.begin());
    if (wanted[2] && !pass.wanted[2]) {
      script.bytes[bytes.size() - 1] = script.bytes[*script.results[2].block] = 0;
      script.results[2] = {};
    }
    return script;
  }

  /// Gives the results, and copies of them, of the blocks from `ahead` on the bytes of these sizes.
  void enlarge_results(AllocationScript& script, const std::vector<Sizes>& sizes, size_t ahead) const {
    for (size_t i = 0; i < sizes.size(); ++i) {
      if (!script.results[i].block.has_value()) continue;
      const int64_t tiny_bytes = script.bytes[*script.results[i].block];
      for (size_t block = ahead; block < script.bytes.size(); ++block) {
        if (script.bytes[block] == tiny_bytes) {
          script.bytes[block] = c10::multiply_integers(sizes[i]) * static_cast<int64_t>(x.element_size());
        }
      }
    }
  }

  /// Turns the bytes that are asked for by a part of the problem into those of the whole. `asked_for_half(dim, half)`
  /// are those of a part with fewer rows or samples.
  template <class AskedForHalf>
  void scale_up(std::vector<int64_t>& bytes, const Pass& pass, const Sizes& part,
                const AskedForHalf& asked_for_half) const {
    const std::vector<int64_t> of_part = bytes;
    const size_t dim = rows_dim();
    if (const int64_t rows = part[dim], all = x.size(static_cast<int64_t>(dim)); rows < all) {
      const int64_t half = rows - rows / 2 / at_dim(stride, dim - 2) * at_dim(stride, dim - 2);
      const std::vector<int64_t> less = asked_for_half(dim, half);
      for (size_t i = 0; i < bytes.size(); ++i) {
        // A gradient of a weight is summed in as many parts, however many rows there are
        const int64_t growth = std::max<int64_t>(of_part[i] - less[i], 0);
        const bool grows = !pass.is_of_weight() || growth * 3 * rows > of_part[i] * 2 * (rows - half);
        if (grows) bytes[i] += growth * (all - rows) / (rows - half);
      }
    }
    if (part[0] < x.size(0)) {
      const std::vector<int64_t> less = asked_for_half(0, part[0] / 2);
      for (size_t i = 0; i < bytes.size(); ++i) {
        if (less[i] * part[0] == of_part[i] * (part[0] / 2)) bytes[i] = bytes[i] / part[0] * x.size(0);
      }
    }
  }
};

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

inline void register_convolutions(KernelRegistry& add) {
  add("convolution", &convolution);
  add("convolution_backward", &convolution_backward);
}

}  // namespace headroom::inline v0::detail::meta
