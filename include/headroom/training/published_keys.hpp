#pragma once

namespace headroom::inline v0::training::detail {

/// Keys of published files without a counterpart: what they say does not matter here, or only for how Python trains.
inline constexpr const char* kKeysWithoutEffect[] = {
    "audio.dim_f",
    "audio.dim_t",
    "audio.hop_length",
    "audio.n_fft",
    "audio.min_mean_abs",
    "model.flash_attn",
    "model.sage_attention",
    "model.dim_freqs_in",
    "training.scheduler",
    "training.num_warmup_steps",
    "training.other_fix",
    "training.augmentation",
    "training.augmentation_type",
    "training.augmentation_mix",
    "training.augmentation_loudness",
    "training.augmentation_loudness_type",
    "training.augmentation_loudness_min",
    "training.augmentation_loudness_max",
    "training.use_mp3_compress",
    "training.precompute_chunks",
    "training.precompute_batch_for_chunks",
    "training.num_precompute_chunks",
    "training.max_class_presence_ratio",
    "training.read_metadata_procs",
    "inference.dim_t",
    "lora",
    "loss_multistft",
    "is_roformer",
};

}  // namespace headroom::inline v0::training::detail
