// Configuration of a thread's AMX tiles.
#pragma once
#include "target.h"

#ifdef __AMX_INT8__
#include <cstdint>

namespace loramux {

// Rows and bytes per row of each tile; unused tiles have 0.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};

  void set(int tile, int64_t count, int64_t bytes_of_row) {
    rows[tile] = static_cast<uint8_t>(count), bytes[tile] = static_cast<uint16_t>(bytes_of_row);
  }
};

// Reading the configuration takes a tenth of the time of writing it.
inline void configure_tiles(const TileConfig& wanted) {
  TileConfig now;
  _tile_storeconfig(&now);
  if (_mm512_cmpneq_epi32_mask(_mm512_load_si512(&now), _mm512_load_si512(&wanted)) != 0) _tile_loadconfig(&wanted);
}

// Compiler barrier: tile intrinsics do not tell the compiler which memory they access.
inline void compiler_barrier() { asm volatile("" ::: "memory"); }

}  // namespace loramux

#endif
