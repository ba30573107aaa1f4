#pragma once

#include <cstdint>
#include <ostream>
#include <vector>

#include "headroom/models/roformer/bands.hpp"
#include "headroom/models/roformer/roformer.hpp"

namespace headroom::inline v0::models {

/// 62 bands of 1025 bins: 24 x 2, 12 x 4, 8 x 12, 8 x 24, 8 x 48, 128, 129.
inline std::vector<int64_t> default_freqs_per_bands() {
  std::vector<int64_t> sizes;
  for (const auto& [bands, bins] : {Band{24, 2}, Band{12, 4}, Band{8, 12}, Band{8, 24}, Band{8, 48}}) {
    sizes.insert(sizes.end(), bands, bins);
  }
  sizes.insert(sizes.end(), {128, 129});
  return sizes;
}

/// Options of BsRoformer, named as in the published YAML files.
struct BsRoformerOptions : RoformerOptions {
  /// Bins of each band, stft_n_fft / 2 + 1 together.
  TORCH_ARG(std::vector<int64_t>, freqs_per_bands) = default_freqs_per_bands();
  /// The stems have nothing in bin 0.
  TORCH_ARG(bool, zero_dc) = true;

 public:
  /// Tokens of a frame.
  int64_t band_count() const { return static_cast<int64_t>(freqs_per_bands_.size()); }
  /// Throws headroom.models.bands.
  std::vector<Band> bands() const { return adjacent_bands(freqs_per_bands_, bins()); }

  static void describe(auto& self, auto&& field) {
    describe_shared(self, field);
    field("freqs_per_bands", self.freqs_per_bands(), {.at_least = 1, .at_most = 1 << 20, .bound = true},
          "frequency bins of each band, stft_n_fft / 2 + 1 together");
    field("zero_dc", self.zero_dc(), {.bound = true}, "stems without a constant part");
  }
};

/// BS-RoFormer (Lu et al. 2023, arXiv:2309.02612) in the layout of the published checkpoints, with their names of
/// parameters (Music-Source-Separation-Training; the PyPI packages bs-roformer-infer and audio-separator).
/// mask_estimator_depth counts linear layers. Throws headroom.models.options, .bands.
class BsRoformerImpl : public RoformerImpl {
 public:
  explicit BsRoformerImpl(const BsRoformerOptions& options)
      : RoformerImpl(options, {.bands = options.bands(),
                               .norm_each_transformer = false,
                               .of_mel = false,
                               .mask_hidden_layers = options.mask_estimator_depth() - 1,
                               .silent_dc = options.zero_dc(),
                               .match_input_audio_length = true}),
        options(options) {}

  void pretty_print(std::ostream& stream) const override {
    stream << "headroom::models::BsRoformer(dim=" << options.dim() << ", depth=" << options.depth()
           << ", bands=" << options.band_count() << ", stems=" << options.stems() << ")";
  }

  BsRoformerOptions options;
};
TORCH_MODULE(BsRoformer);

}  // namespace headroom::inline v0::models
