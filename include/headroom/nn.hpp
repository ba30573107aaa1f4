#pragma once

#include "headroom/nn/attention.hpp"
#include "headroom/nn/encoder.hpp"
#include "headroom/nn/encoder_block.hpp"
#include "headroom/nn/feed_forward.hpp"
#include "headroom/nn/linear.hpp"
#include "headroom/nn/linear_attention.hpp"
#include "headroom/nn/matrix_product.hpp"
#include "headroom/nn/multihead_attention.hpp"
#include "headroom/nn/rms_norm.hpp"
#include "headroom/nn/rotary.hpp"
#include "headroom/nn/token_axis.hpp"
