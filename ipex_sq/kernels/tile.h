// The tile of a product: 64 columns of a weight, packed [in / 4, 64, 4] int8.

#pragma once

#include <cstdint>

#include "vectors.h"

namespace ipex_sq {

constexpr int64_t kTile = 64; // columns
constexpr int64_t kVectors = kTile / kVector;
constexpr int64_t kFour = 4; // levels that one instruction multiplies and adds up
constexpr int64_t kLine = 64; // bytes that memory is read and written in

} // namespace ipex_sq
