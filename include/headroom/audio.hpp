#pragma once

// What reads, writes, resamples and separates files (audio/file.hpp, recording_level.hpp, resampler.hpp,
// separate_file.hpp and what they include) needs libsndfile and libsoxr, which headroom::training links.
#include "headroom/audio/channels.hpp"
#include "headroom/audio/container.hpp"
#include "headroom/audio/ensemble.hpp"
#include "headroom/audio/flac_frames.hpp"
#include "headroom/audio/hearing_energy.hpp"
#include "headroom/audio/level.hpp"
#include "headroom/audio/losses.hpp"
#include "headroom/audio/metrics.hpp"
#include "headroom/audio/sample_queue.hpp"
#include "headroom/audio/segment_model.hpp"
#include "headroom/audio/separator.hpp"
#include "headroom/audio/separator_stream.hpp"
#include "headroom/audio/smallest_errors.hpp"
#include "headroom/audio/stft.hpp"
#include "headroom/audio/test_time.hpp"
#include "headroom/audio/untagged_file.hpp"
#include "headroom/audio/waveform_loss.hpp"
