#pragma once

#include <cstdint>
#include <ostream>
#include <vector>

#include "headroom/models/roformer/bands.hpp"
#include "headroom/models/roformer/roformer.hpp"

namespace headroom::inline v0::models {

/// Options of MelBandRoformer, named as in the published YAML files.
struct MelBandRoformerOptions : RoformerOptions {
  MelBandRoformerOptions() { attn_dropout(0.1).ff_dropout(0.1).mask_estimator_depth(1); }
  /// Mel bands, which overlap.
  TORCH_ARG(int64_t, num_bands) = 60;
  /// Of the mixture, Hz: where the mel bands lie.
  TORCH_ARG(int64_t, sample_rate) = 44100;
  /// Stems to the last sample; else what follows the last whole hop is silent.
  TORCH_ARG(bool, match_input_audio_length) = false;

 public:
  /// Tokens of a frame.
  int64_t band_count() const { return num_bands_; }
  /// Throws headroom.models.bands.
  std::vector<Band> bands() const { return mel_bands(num_bands_, stft_n_fft(), sample_rate_); }

  static void describe(auto& self, auto&& field) {
    describe_shared(self, field);
    field("num_bands", self.num_bands(), {.at_least = 2, .at_most = 1 << 20, .bound = true},
          "mel bands, which overlap");
    field("match_input_audio_length", self.match_input_audio_length(), {},
          "stems to the last sample; else what follows the last whole hop is silent");
  }
};

/// Mel-Band RoFormer (Wang et al. 2023, arXiv:2310.01809): bands of the mel scale, which overlap; where they do, the
/// mask is the mean of theirs. Layout and names of parameters are those of the published checkpoints. Each transformer
/// ends with a norm. mask_estimator_depth counts hidden layers. Throws headroom.models.options, .bands.
class MelBandRoformerImpl : public RoformerImpl {
 public:
  explicit MelBandRoformerImpl(const MelBandRoformerOptions& options)
      : RoformerImpl(options, {.bands = options.bands(),
                               .norm_each_transformer = true,
                               .of_mel = true,
                               .mask_hidden_layers = options.mask_estimator_depth(),
                               .silent_dc = false,
                               .match_input_audio_length = options.match_input_audio_length()}),
        options(options) {}

  void pretty_print(std::ostream& stream) const override {
    stream << "headroom::models::MelBandRoformer(dim=" << options.dim() << ", depth=" << options.depth()
           << ", bands=" << options.num_bands() << ", stems=" << options.stems() << ")";
  }

  MelBandRoformerOptions options;
};
TORCH_MODULE(MelBandRoformer);

}  // namespace headroom::inline v0::models
