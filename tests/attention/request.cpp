#include "support/attention_requests.hpp"

using namespace headroom;
using namespace headroom::testing;

namespace {

/// The definition in plain loops over scalars, options read straight from what was given. No dropout, no rotary.
std::pair<Tensor, Tensor> by_definition(const AttentionCase& request) {
  const auto& [name, q, k, v, options, unused] = request;
  const int64_t batch = q.size(0), heads = q.size(1), queries = q.size(2), keys = k.size(2);
  Tensor output = torch::zeros({batch, heads, queries, v.size(3)}, torch::kDouble);
  Tensor lse = torch::zeros({batch, heads, queries}, torch::kDouble);
  const auto element = [&](const Tensor& x, std::vector<int64_t> sizes, std::vector<int64_t> index) {
    Tensor view = x.expand(sizes);
    for (const int64_t i : index) view = view[i];
    return view.item();
  };
  const auto sequence_of = [](const Tensor& starts, int64_t i) {
    int64_t s = 0;
    while (starts[s + 1].item<int64_t>() <= i) ++s;
    return s;
  };
  const std::vector<int64_t> sizes{batch, heads, queries, keys};
  const double scale = options.scale().value_or(1 / std::sqrt(std::max<double>(static_cast<double>(q.size(3)), 1)));
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t h = 0; h < heads; ++h) {
      const Tensor key = k[k.size(0) == 1 ? 0 : b][h * k.size(1) / heads],
                   value = v[v.size(0) == 1 ? 0 : b][h * k.size(1) / heads];
      for (int64_t i = 0; i < queries; ++i) {
        const Tensor products = torch::mv(key, q[b][h][i]) * scale;
        double sum = options.sink() ? std::exp((*options.sink())[h].item<double>()) : 0;
        Tensor mean = torch::zeros({v.size(3)}, torch::kDouble);
        for (int64_t j = 0; j < keys; ++j) {
          int64_t start = 0, key_start = 0, ahead = keys - queries;  // ahead: of keys at the end of a sequence
          bool visible = true;
          if (options.sequence_starts()) {
            const Tensor starts = *options.sequence_starts(),
                         key_starts = options.key_sequence_starts().value_or(starts);
            const int64_t s = sequence_of(starts, i);
            visible = s == sequence_of(key_starts, j);
            start = starts[s].item<int64_t>(), key_start = key_starts[s].item<int64_t>();
            ahead = key_starts[s + 1].item<int64_t>() - key_start - (starts[s + 1].item<int64_t>() - start);
          }
          if (options.alignment() == AttentionAlignment::top_left) ahead = 0;
          const int64_t distance = (i - start + ahead + options.query_offset()) - (j - key_start);
          visible = visible && (!options.causal() || distance >= 0);
          const bool is_global = std::min(j - key_start, j - key_start + distance) < options.global_keys();
          if (options.window() && options.window()->left >= 0)
            visible = visible && (is_global || distance <= options.window()->left);
          if (options.window() && options.window()->right >= 0)
            visible = visible && (is_global || -distance <= options.window()->right);
          if (options.key_lengths()) visible = visible && j < element(*options.key_lengths(), {batch}, {b}).toLong();
          if (options.mask()) visible = visible && element(*options.mask(), sizes, {b, h, i, j}).toBool();
          if (options.hidden()) visible = visible && !element(*options.hidden(), sizes, {b, h, i, j}).toBool();
          if (options.block_mask()) {
            const int64_t size = options.block_size();
            visible = visible && element(*options.block_mask(),
                                         {batch, heads, (queries + size - 1) / size, (keys + size - 1) / size},
                                         {b, h, i / size, j / size})
                                     .toBool();
          }
          if (!visible) continue;
          double score = products[j].item<double>();
          if (options.softcap()) score = *options.softcap() * std::tanh(score / *options.softcap());
          if (options.bias()) score += element(*options.bias(), sizes, {b, h, i, j}).toDouble();
          if (options.relative_bias()) {
            const int64_t reach = options.relative_bias()->size(1) / 2;
            score += element(*options.relative_bias(), {heads, 2 * reach + 1},
                             {h, std::clamp(distance, -reach, reach) + reach})
                         .toDouble();
          }
          if (options.alibi_slopes()) {
            score -=
                element(*options.alibi_slopes(), {batch, heads, queries}, {b, h, i}).toDouble() * std::abs(distance);
          }
          sum += std::exp(score);
          mean += value[j] * std::exp(score);
        }
        output[b][h][i] = sum > 0 ? mean / sum : mean;
        lse[b][h][i] = std::log(sum);
      }
    }
  }
  return {output, lse};
}

}  // namespace

TEST_CASE("the reference computes the definition") {
  for (AttentionCase& request : attention_cases()) {
    if (request.q.dim() != 4 || request.options.dropout() > 0 || request.options.rotary() || request.options.polar()) {
      continue;
    }
    INFO(request.name);
    const auto [expected, expected_lse] = by_definition(request);
    const auto [output, lse] = attention_with_lse(
        request.q, request.k, request.v, AttentionOptions(request.options).backend(AttentionBackend::reference));
    REQUIRE(output.sizes() == expected.sizes());
    CHECK(largest(output - expected) < 1e-12);
    CHECK(largest((lse - expected_lse).masked_fill(lse == expected_lse, 0)) < 1e-12);
  }
}

TEST_CASE("rotary embedding in a request is the rotation of q and k") {
  torch::manual_seed(1);
  const Tensor q = torch::randn({2, 3, 7, 6}, torch::kDouble), k = torch::randn({2, 3, 9, 6}, torch::kDouble);
  const Tensor angles = torch::rand({12, 2}, torch::kDouble) * 6,
               table = torch::polar(torch::ones_like(angles), angles);
  const auto turn = [&](const Tensor& x, int64_t offset) {
    Tensor result = x.clone();
    for (int64_t i = 0; i < x.size(2); ++i) {
      for (int64_t pair = 0; pair < 2; ++pair) {
        const double angle = angles[i + offset][pair].item<double>();
        const Tensor a = x.select(2, i).select(-1, 2 * pair), b = x.select(2, i).select(-1, 2 * pair + 1);
        result.select(2, i).select(-1, 2 * pair).copy_(a * std::cos(angle) - b * std::sin(angle));
        result.select(2, i).select(-1, 2 * pair + 1).copy_(a * std::sin(angle) + b * std::cos(angle));
      }
    }
    return result;
  };
  for (const auto backend : {AttentionBackend::reference, AttentionBackend::chunked}) {
    const auto options = AttentionOptions().query_offset(5).causal(true).backend(backend);
    const Tensor expected = attention(turn(q, 5), turn(k, 0), k, options);
    CHECK(largest(attention(q, k, k, AttentionOptions(options).rotary(table)) - expected) < 1e-13);
  }
}

TEST_CASE("dropout by ATen keeps what core's hash keeps") {
  for (const uint64_t seed : {uint64_t{0}, uint64_t{1}, uint64_t{0x123456789abcdef0}, ~uint64_t{0}}) {
    for (const double probability : {1e-6, 0.1, 0.5, 0.97}) {
      const core::Dropout dropout{probability, seed};
      const Tensor heads = torch::tensor({0, 7, 70000, 2147483647}),
                   queries = torch::tensor({0, 1, 99, 65536, 1 << 30}),
                   keys = torch::tensor({0, 1, 2, 3, 1000, 131071});
      const Tensor kept = headroom::detail::DropoutMask::kept(dropout, heads, queries, keys);
      REQUIRE(kept.sizes() == at::IntArrayRef({4, 5, 6}));
      for (int64_t h = 0; h < 4; ++h) {
        for (int64_t i = 0; i < 5; ++i) {
          const auto row = dropout.row_key(static_cast<uint32_t>(heads[h].item<int64_t>()),
                                           static_cast<uint32_t>(queries[i].item<int64_t>()));
          for (int64_t j = 0; j < 6; ++j) {
            const bool keep =
                core::Dropout::bits(row, static_cast<uint32_t>(keys[j].item<int64_t>())) >= dropout.threshold();
            CHECK(kept[h][i][j].item<bool>() == keep);
          }
        }
      }
    }
  }
}

TEST_CASE("dropout keeps the share it should, by the generator's seed") {
  const int64_t length = 400;
  // With equal weights and values of the unit matrix the output shows every weight
  const Tensor q = torch::zeros({2, 2, length, 4}), v = torch::eye(length).expand({2, 2, length, length});
  for (const auto backend : {AttentionBackend::chunked, AttentionBackend::reference}) {
    for (const double p : {0.1, 0.5}) {
      const auto options = AttentionOptions().dropout(p).backend(backend);
      const auto draw = [&](uint64_t seed) {
        torch::manual_seed(seed);
        return attention(q, q, v, options);
      };
      const Tensor weights = draw(1), kept = weights != 0;
      const double count = static_cast<double>(kept.numel());
      CHECK(std::abs(kept.sum().item<double>() - (1 - p) * count) < 5 * std::sqrt(count * p * (1 - p)));
      CHECK(largest(weights.masked_select(kept) * length * (1 - p) - 1) < 1e-4);
      CHECK(draw(1).equal(weights));
      CHECK_FALSE(draw(2).equal(weights));
      CHECK_FALSE(attention(q, q, v, options).equal(weights));  // the generator moved on
      CHECK_FALSE(kept[0][0].equal(kept[0][1]));
      CHECK_FALSE(kept[0][0].equal(kept[1][0]));
      auto generator = at::make_generator<at::CPUGeneratorImpl>(uint64_t{1});
      CHECK(attention(q, q, v, AttentionOptions(options).generator(generator)).equal(weights));
    }
  }
}

TEST_CASE("a seed is used as it is, and the generator left alone") {
  const Tensor x = torch::randn({1, 2, 9, 4}, torch::kDouble);
  const auto run = [&](uint64_t seed) { return attention(x, x, x, AttentionOptions().dropout(0.5).seed(seed)); };
  torch::manual_seed(5);
  const Tensor expected = torch::rand({3});
  torch::manual_seed(5);
  const Tensor first = run(7);
  CHECK(torch::equal(torch::rand({3}), expected));
  CHECK(torch::equal(run(7), first));
  CHECK_FALSE(torch::equal(run(8), first));
  CHECK_FALSE(torch::equal(run(uint64_t{7} << 32), first));
}

TEST_CASE("backends have names") {
  for (const auto name : kAttentionBackendNames) {
    std::ostringstream printed;
    printed << attention_backend(name);
    CHECK(printed.str() == name);
  }
  const Error error = error_of([] { attention_backend("flash"); });
  CHECK(error.id() == "headroom.attention.backend_name");
  CHECK(contains(error.what(), "\"flash\"; expected one of automatic, tiled, fused, chunked, reference"));
}

TEST_CASE("queries of packed sequences are aligned with the ends of their keys") {
  torch::manual_seed(8);
  const auto make = [](int64_t length) { return torch::randn({1, 2, length, 4}, torch::kDouble); };
  const Tensor q = make(12), k = make(20), v = make(20);
  const auto bottom_right = AttentionOptions().causal(true).alignment(AttentionAlignment::bottom_right);
  const Tensor starts = torch::tensor({0, 3, 10, 12}), key_starts = torch::tensor({0, 9, 14, 20});
  for (const auto backend : {AttentionBackend::tiled, AttentionBackend::chunked, AttentionBackend::reference}) {
    INFO(backend);
    const Tensor packed = attention(
        q, k, v,
        AttentionOptions(bottom_right).sequence_starts(starts).key_sequence_starts(key_starts).backend(backend));
    for (int64_t s = 0; s < 3; ++s) {
      const auto part = [s](const Tensor& x, const Tensor& ends) {
        return x.slice(2, ends[s].item<int64_t>(), ends[s + 1].item<int64_t>());
      };
      const Tensor own = part(q, starts), keys = part(k, key_starts), values = part(v, key_starts);
      const int64_t offset = keys.size(2) - own.size(2);  // 6, -2, 4
      const Tensor expected = attention(own, keys, values, AttentionOptions().causal(true).query_offset(offset));
      CHECK(largest(part(packed, starts) - expected) < 1e-14);
      CHECK(largest(attention(own, keys, values, AttentionOptions(bottom_right).backend(backend)) - expected) < 1e-14);
    }
  }
  for (const auto name : kAttentionAlignmentNames) {
    CHECK(kAttentionAlignmentNames[static_cast<int>(attention_alignment(name))] == name);
  }
  CHECK(error_of([] { attention_alignment("bottom_left"); }).id() == "headroom.attention.alignment_name");
}

TEST_CASE("without dropout the generator is left alone") {
  torch::manual_seed(3);
  const Tensor expected = torch::rand({4});
  torch::manual_seed(3);
  const Tensor q = torch::zeros({1, 2, 3, 4});
  attention(q, q, q);
  CHECK(torch::rand({4}).equal(expected));
}

TEST_CASE("a request that does not fit is refused with what was given and what is expected") {
  const Tensor q = torch::randn({2, 4, 8, 6}), k = torch::randn({2, 2, 10, 6});
  using O = AttentionOptions;
  struct Refusal {
    O options;
    std::string id, message;
  };
  const auto floats = [](at::IntArrayRef shape) { return torch::zeros(shape); };
  const auto bools = [](at::IntArrayRef shape) { return torch::zeros(shape, torch::kBool); };
  const Tensor table = torch::ones({18, 3}, torch::kComplexFloat);
  const Refusal refusals[] = {
      {O().scale(INFINITY), "scale", "scale is inf"},
      {O().softcap(0), "softcap", "softcap is 0, expected a finite number above 0"},
      {O().softcap(-3), "softcap", "softcap is -3"},
      {O().softcap(INFINITY), "softcap", "softcap is inf"},
      {O().query_offset(int64_t{1} << 61), "query_offset", "between -2^60 and 2^60"},
      {O().key_lengths(torch::tensor({10, 11})), "key_lengths", "contains 11"},
      {O().key_lengths(torch::tensor({-1, 1})), "key_lengths", "contains -1"},
      {O().key_lengths(torch::tensor({1, 2, 3})), "key_lengths", "has shape [3]"},
      {O().key_lengths(torch::tensor({1.0, 2.0})), "key_lengths", "is float [2] on cpu"},
      {O().key_lengths(Tensor()), "key_lengths", "is undefined"},
      {O().key_lengths(torch::tensor({1, 2}).to(torch::kMeta)), "key_lengths", "on meta"},
      {O().sequence_starts(torch::tensor({0, 5, 8})), "sequences",
       "sequence_starts ends with 8; expected [S+1] integers on the CPU from 0 to 10"},
      {O().sequence_starts(torch::tensor({1, 8})), "sequences", "starts with 1"},
      {O().sequence_starts(torch::tensor({0, 5, 4, 8})), "sequences", "falls to 4"},
      {O().sequence_starts(torch::tensor({0.0, 8.0})), "sequences", "is float"},
      {O().sequence_starts(torch::tensor({{0, 8}})), "sequences", "[1, 2]"},
      {O().key_sequence_starts(torch::tensor({0, 10})), "sequences", "without sequence_starts"},
      {O().sequence_starts(torch::tensor({0, 8})).key_sequence_starts(torch::tensor({0, 3, 10})), "sequences",
       "2 elements, key_sequence_starts 3"},
      {O().mask(floats({8, 10})), "mask",
       "mask is float [8, 10] on cpu; expected bool on cpu, broadcastable to [2, 4, 8, 10]"},
      {O().mask(bools({8, 9})), "mask", "[8, 9]"},
      {O().mask(bools({1, 2, 4, 8, 10})), "mask", "[1, 2, 4, 8, 10]"},
      {O().mask(bools({8, 10}).to(torch::kMeta)), "mask", "on meta"},
      {O().hidden(bools({3})), "mask", "hidden is bool [3]"},
      {O().mask(bools({8, 10})).hidden(bools({8, 10})), "mask", "both given"},
      {O().block_mask(bools({1, 2})).block_size(0), "block_mask", "block_size is 0"},
      {O().block_mask(bools({2, 2})).block_size(4), "block_mask", "broadcastable to [2, 4, 2, 3]"},
      {O().bias(floats({8, 9})), "bias",
       "bias is float [8, 9] on cpu; expected float on cpu, broadcastable to [2, 4, 8, 10]"},
      {O().bias(floats({8, 10}).to(torch::kDouble)), "bias", "is double"},
      {O().bias(floats({8, 10}).to(torch::kMeta)), "bias", "on meta"},
      {O().relative_bias(floats({4, 8})), "relative_bias", "shape [4 or 1, 2R-1]"},
      {O().relative_bias(floats({3, 7})), "relative_bias", "[3, 7]"},
      {O().relative_bias(floats({7})), "relative_bias", "[7]"},
      {O().alibi_slopes(floats({4})), "alibi_slopes", "broadcastable to [2, 4, 8]"},
      {O().sink(floats({1})), "sink", "shape [4]"},
      {O().sink(torch::zeros({4}, torch::kLong)), "sink", "is long"},
      {O().rotary(floats({18, 3})), "rotary", "is float"},
      {O().rotary(torch::ones({18, 4}, torch::kComplexFloat)), "rotary", "at most 3 pairs"},
      {O().rotary(table.slice(0, 0, 9)), "rotary", "has 9 rows and positions go from 0 to 9"},
      {O().rotary(table).query_offset(11), "rotary", "from 11 to 18"},
      {O().rotary(table).query_offset(-1), "rotary", "no position below 0"},
      {O().polar(torch::ones({18, 6}, torch::kComplexFloat)), "polar", "expected float or double [positions, 12]"},
      {O().polar(floats({18, 6})), "polar", "is float [18, 6]"},
      {O().polar(floats({9, 12})), "polar", "has 9 rows and positions go from 0 to 9"},
      {O().polar(floats({18, 12})).query_offset(-1), "polar", "no position below 0"},
      {O().polar(floats({18, 12})).rotary(table), "polar", "leave one of them out"},
      {O().polar_phase(floats({2, 6})), "polar", "without polar"},
      {O().polar(floats({18, 12})).polar_phase(floats({3, 6})), "polar", "shape ["},
      {O().dropout(1), "dropout", "dropout is 1, expected a probability in [0, 1)"},
      {O().dropout(-0.1), "dropout", "-0.1"},
      {O().dropout(std::nan("")), "dropout", "nan"},
      {O().dropout(0.1).generator(at::Generator()), "dropout", "generator"},
  };
  for (const auto& [options, id, message] : refusals) {
    INFO(id << ": " << message);
    const Error error = error_of([&, &given = options] { attention(q, k, k, given); });
    INFO(error.what());
    CHECK(error.id() == "headroom.attention." + id);
    CHECK(contains(error.what(), message));
  }
}

TEST_CASE("shapes of grouped and broadcast keys are checked") {
  const Tensor q = torch::randn({2, 4, 8, 6});
  const auto message = [&](const Tensor& k, const Tensor& v) {
    const Error error = error_of([&] { attention(q, k, v); });
    CHECK(error.id() == "headroom.attention.shape");
    return std::string(error.what());
  };
  const auto make = [](at::IntArrayRef shape) { return torch::randn(shape); };
  CHECK(contains(message(make({2, 3, 8, 6}), make({2, 3, 8, 6})), "the heads of k and v do not divide those of q"));
  CHECK(contains(message(make({2, 2, 8, 6}), make({2, 4, 8, 6})), "k and v differ in batch or head dimensions"));
  CHECK(contains(message(make({3, 4, 8, 6}), make({3, 4, 8, 6})), "do not broadcast to those of q"));
  CHECK(contains(message(make({2, 0, 8, 6}), make({2, 0, 8, 6})), "do not divide"));
  CHECK(contains(message(make({2, 4, 8, 5}), make({2, 4, 8, 6})), "q and k differ in the last dimension"));
  CHECK(contains(message(make({2, 4, 8, 6}), make({2, 4, 9, 6})), "k and v differ in length"));
  CHECK(contains(message(make({4, 8, 6}), make({4, 8, 6})), "ranks differ"));
}

TEST_CASE("inputs of another dtype, device or layout are refused before they are read") {
  const Tensor q = torch::randn({2, 4, 8, 6});
  struct Refusal {
    Tensor given;
    std::string message;
  };
  const Refusal refusals[] = {
      {q.to(torch::kDouble), "is double [2, 4, 8, 6] on cpu"},
      {q.to(torch::kLong), "is long"},
      {q.to(torch::kMeta), "on meta"},
      {q.to_sparse(), "with layout Sparse"},
      {q.to_mkldnn(), "with layout Mkldnn"},
      {at::_nested_tensor_from_tensor_list({q[0], q[1]}), "is float of a nested tensor"},
  };
  for (const auto& [given, message] : refusals) {
    for (int input = 0; input < 3; ++input) {
      INFO(message << ", input " << input);
      Tensor inputs[] = {q, q, q};
      inputs[input] = given;
      const Error error = error_of([&] { attention(inputs[0], inputs[1], inputs[2]); });
      INFO(error.what());
      CHECK(error.id() == "headroom.attention.dtype");
      CHECK(contains(error.what(), message));
      CHECK(contains(error.what(), "; expected three strided tensors of one dtype on one device"));
    }
    for (const auto backend : {AttentionBackend::tiled, AttentionBackend::chunked, AttentionBackend::reference}) {
      if (given.is_floating_point() && given.layout() == torch::kStrided && !given.is_nested()) continue;
      const auto options = AttentionOptions().backend(backend);
      CHECK(error_of([&] { attention(given, given, given, options); }).id() == "headroom.attention.dtype");
    }
  }
  for (const auto dtype : {torch::kLong, torch::kBool, torch::kComplexFloat, torch::kFloat8_e4m3fn}) {
    const Tensor x = q.to(dtype);
    const Error error = error_of([&] { attention(x, x, x); });
    CHECK(error.id() == "headroom.attention.dtype");
    CHECK(contains(error.what(), "expected float, double, bfloat16 or half"));
  }
  for (const std::vector<Tensor>& undefined : {std::vector{Tensor(), q, q}, {q, Tensor(), q}, {q, q, Tensor()}}) {
    CHECK(error_of([&] { attention(undefined[0], undefined[1], undefined[2]); }).id() == "headroom.attention.shape");
  }
}

TEST_CASE("options of another device or layout are refused before they are read") {
  const int64_t length = 8;
  const Tensor q = torch::randn({1, 4, length, 6});
  using O = AttentionOptions;
  struct Option {
    std::string id;
    Tensor fits;
    std::function<O(const Tensor&)> with;
  };
  const Tensor lengths = torch::full({1}, length, torch::kLong), starts = torch::tensor({int64_t{0}, length});
  const Option options[] = {
      {"key_lengths", lengths, [](const Tensor& x) { return O().key_lengths(x); }},
      {"sequences", starts, [](const Tensor& x) { return O().sequence_starts(x); }},
      {"sequences", starts, [&](const Tensor& x) { return O().sequence_starts(starts).key_sequence_starts(x); }},
      {"mask", torch::ones({length, length}, torch::kBool), [](const Tensor& x) { return O().mask(x); }},
      {"mask", torch::zeros({length, length}, torch::kBool), [](const Tensor& x) { return O().hidden(x); }},
      {"block_mask", torch::ones({4, 4}, torch::kBool),
       [](const Tensor& x) { return O().block_mask(x).block_size(2); }},
      {"bias", torch::randn({length, length}), [](const Tensor& x) { return O().bias(x); }},
      {"relative_bias", torch::randn({4, 3}), [](const Tensor& x) { return O().relative_bias(x); }},
      {"alibi_slopes", torch::randn({4, length}), [](const Tensor& x) { return O().alibi_slopes(x); }},
      {"sink", torch::randn({4}), [](const Tensor& x) { return O().sink(x); }},
      {"rotary", torch::ones({length, 3}, torch::kComplexFloat), [](const Tensor& x) { return O().rotary(x); }},
      {"polar", torch::randn({length, 12}), [](const Tensor& x) { return O().polar(x); }},
      {"polar", torch::randn({4, 6}),
       [&](const Tensor& x) {
         return O().polar(torch::randn({length, 12})).polar_phase(x);
       }},
  };
  for (const auto& [id, fits, with] : options) {
    CHECK(attention(q, q, q, with(fits)).sizes() == q.sizes());
    std::vector<Tensor> bad{Tensor(), fits.to(torch::kMeta), fits.to_sparse(),
                            at::_nested_tensor_from_tensor_list({fits, fits}),
                            torch::empty(fits.sizes(), torch::kFloat8_e5m2)};
    if (fits.scalar_type() == torch::kFloat) bad.push_back(fits.to_mkldnn());
    for (const Tensor& given : bad) {
      const Error error = error_of([&, &make = with] { attention(q, q, q, make(given)); });
      INFO(error.what());
      CHECK(error.id() == "headroom.attention." + id);
      CHECK(contains(error.what(), "; expected "));
    }
  }
}

TEST_CASE("numbers that float cannot hold are refused") {
  const Tensor q = torch::randn({1, 1, 4, 2});
  const auto id = [&](const AttentionOptions& options) { return error_of([&] { attention(q, q, q, options); }).id(); };
  for (const double scale : {double{INFINITY}, -double{INFINITY}, std::nan(""), 1e39}) {
    CHECK(id(AttentionOptions().scale(scale)) == "headroom.attention.scale");
  }
  for (const double softcap : {double{INFINITY}, std::nan(""), 1e39, 1e-39, 0.0, -1.0}) {
    CHECK(id(AttentionOptions().softcap(softcap)) == "headroom.attention.softcap");
  }
  CHECK(id(AttentionOptions().global_keys(-1)) == "headroom.attention.global_keys");
  for (const double dropout : {1.0, 1.5, -1e-9, std::nan(""), double{INFINITY}}) {
    CHECK(id(AttentionOptions().dropout(dropout)) == "headroom.attention.dropout");
  }
}

TEST_CASE("a minus sign that lies beside the memory is read") {
  torch::manual_seed(5);
  const auto negated = [](at::IntArrayRef shape) {
    const Tensor x = torch::imag(torch::randn(shape, torch::kComplexDouble).conj());
    REQUIRE(x.is_neg());
    return x;
  };
  const Tensor q = negated({1, 2, 7, 4}), k = negated({1, 2, 9, 4}), v = negated({1, 2, 9, 3}),
               bias = negated({2, 7, 9}), grad = negated({1, 2, 7, 3});
  const Tensor angles = torch::rand({9, 2}, torch::kDouble);
  const Tensor table = torch::polar(torch::ones_like(angles), angles).conj();
  const auto run = [&](const std::function<Tensor(const Tensor&)>& change) {
    const Tensor leaf = change(q).detach().requires_grad_();
    const Tensor output =
        attention(leaf, change(k), change(v), AttentionOptions().bias(change(bias)).rotary(change(table)));
    return std::pair(output.detach(), torch::autograd::grad({output}, {leaf}, {change(grad)})[0]);
  };
  const auto [output, gradient] = run([](const Tensor& x) { return x; });
  const auto [expected, expected_gradient] = run([](const Tensor& x) { return x.resolve_conj().resolve_neg(); });
  CHECK(output.equal(expected));
  CHECK(gradient.equal(expected_gradient));
}

TEST_CASE("bfloat16 takes what is added to scores in float") {
  const Tensor q = torch::randn({1, 2, 8, 4}).to(torch::kBFloat16), bias = torch::randn({2, 8, 8}).requires_grad_();
  for (const auto backend : {AttentionBackend::reference, AttentionBackend::chunked}) {
    const Tensor output = attention(q, q, q, AttentionOptions().bias(bias).backend(backend));
    CHECK(output.scalar_type() == torch::kBFloat16);
    const Tensor grad = torch::autograd::grad({output.to(torch::kFloat).square().sum()}, {bias})[0];
    CHECK(grad.scalar_type() == torch::kFloat);
    CHECK(largest(grad) > 0);
  }
}

TEST_CASE("automatic takes a backend that serves the request") {
  torch::manual_seed(4);
  const Tensor q = torch::randn({1, 2, 30, 4});
  const auto options = AttentionOptions().softcap(1).window(AttentionWindow{3, 3});
  CHECK(largest(attention(q, q, q, options) -
                attention(q, q, q, AttentionOptions(options).backend(AttentionBackend::reference))) < 1e-5);
}
