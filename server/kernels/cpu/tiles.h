// The matrix unit's tiles as a thread has them. Whoever has used the unit in this thread before may have left them otherwise.
#pragma once
#include "target.h"

#ifdef __AMX_INT8__
#include <cstdint>

namespace loramux {

// How many rows each tile has, and how many bytes a row; those that have none are not used.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};

  void set(int tile, int64_t count, int64_t bytes_of_row) {
    rows[tile] = static_cast<uint8_t>(count), bytes[tile] = static_cast<uint16_t>(bytes_of_row);
  }
};

// To ask takes a tenth of the time of saying so.
inline void configure(const TileConfig& wanted) {
  TileConfig now;
  _tile_storeconfig(&now);
  if (_mm512_cmpneq_epi32_mask(_mm512_load_si512(&now), _mm512_load_si512(&wanted)) != 0) _tile_loadconfig(&wanted);
}

// Intrinsics of tiles do not tell the compiler what memory they read.
inline void written() { asm volatile("" ::: "memory"); }

}  // namespace loramux

#endif
