// What Python and the kernels share: plain structs over raw pointers, mirrored field by field in bindings.py.
// Nothing here owns memory; whoever fills a struct keeps its arrays alive while the model holds them.
#pragma once
#include "target.h"

#include <cstdint>

namespace loramux {

enum Scheme : int32_t { INT4 = 0, NF4 = 1, INT8 = 2, NONE = 3 };

// Inputs in codes are filled up to whole groups of 32.
inline int64_t padded_inputs(int64_t in) { return (in + 31) / 32 * 32; }

// A matrix [n, k], w = the module's weight, in tiles of 16 of its rows ("columns" of a product's output).
// With kp = k rounded up to 32, tiles = ceil(n / 16), g = k / group:
//   codes  INT4, NF4  [tiles][kp/32][4][16][4]: byte (s, c, b) has input 4s+b in its low nibble, 16+4s+b in the high
//          INT8       [tiles][kp/32][8][16][4]: byte (s, c, b) is the code of input 4s+b plus 128
//          NONE       [tiles][kp/2][16][2] bf16
//   scale  float16 [tiles][g][16] (NF4, INT8)
//   or, for INT4, span_scales int16 with exponents int8 [tiles][16]: in units of 2^exponent scales s, and z = zero / 8 + s, so
//          that w = (code - 8) scale + 8 z. [tiles][g][2][16], all s and then all z, where spans of 64 inputs are of one
//          group each, else [tiles][ceil(kp/64)][2][16][2], of both halves of each span, zero beyond k.
//          s and 8 (z - s) are the scale and the zero once they are rounded to float16, but for the groups odd_at
//          (int64 [odd_count], ascending, row * g + group), whose scale and zero are `odd` (float16 [odd_count][2])
//   or scale_codes (zero_codes) uint8 [tiles][g][16] with step and base float32 [tiles][ceil(g/16)].
//   fineness bf16 [tiles][16], or null, as it is for NONE: how many units of its column 1 is. A weight of the column is at
//          most 127 units, a scale of INT4 less than 16, and few are so much less that whole numbers of units, or of 256ths
//          for INT8, are not as good. As bf16 has eight bits, 2^(exponent + 23) times it is a whole number, of 12 to 14 bits
//   rising uint8 [1], where INT4 has a fineness and no scale is negative
struct Matrix {
  const uint8_t* codes;
  const uint16_t* scale;
  const int16_t* span_scales;
  const int8_t* exponents;
  const int64_t* odd_at;
  const uint16_t* odd;
  const uint8_t* scale_codes;
  const uint8_t* zero_codes;
  const float* scale_step;
  const float* scale_base;
  const float* zero_step;
  const float* zero_base;
  const uint16_t* fineness;
  const uint8_t* rising;
  const float* bias;  // [n] or null
  int64_t n, k, odd_count;
  int32_t scheme, group;
  bool coarse = false;  // INT4 that is rising: whether weights are bytes, as some are in steps

  bool whole_spans() const { return group % 64 == 0; }
  int64_t span_scale_count() const { return whole_spans() ? k / group : (padded() + 63) / 64; }  // of a tile
  int64_t tiles() const { return (n + 15) / 16; }
  bool in_pairs() const { return scheme == INT4 && scale_codes == nullptr; }  // whether scales are whole numbers
  bool by_unit() const { return MATRIX_UNIT && fineness != nullptr; }  // whether products are the matrix unit's
  int64_t padded() const { return padded_inputs(k); }
};

enum SiteIndex : int { Q = 0, K = 1, V = 2, O = 3, GATE = 4, UP = 5, DOWN = 6, SITES = 7 };

struct Layer {
  Matrix site[SITES];
  const float* input_norm;
  const float* post_norm;
  const float* q_norm;  // [head_dim] or null
  const float* k_norm;
  int64_t rope;  // 0 for a layer without positions
};

struct Config {
  int64_t hidden, intermediate, layers, heads, kv_heads, head_dim, vocab, max_slots;
  double eps;
};

// One module of an adapter, as its matrix of the base is. Beside codes both are codes, 128 added to each, and zero where
// there is nothing: a in tiles of 16 ranks, and a last one of 8 where no more are left, [kp/4][16 or 8][4], and b [tiles of
// 16 columns][fours of ranks][16][4]; what the product of a rank's two counts in is in units [rank]. Beside a matrix of bf16
// both are that, a [rank, in] and b [rank, out] (B transposed), and units is null. rank 0: none.
struct LoraSite {
  const float* units;
  const void* a;
  const void* b;
  int64_t rank;
  double scale;

  bool coded() const { return units != nullptr; }
};

// Of a tile of A, with so many ranks left; server/kernels/cpu/adapter_codes.py's bytes_of_a counts by the same rule.
inline int64_t ranks_of_tile(int64_t left) { return left > 8 ? 16 : 8; }

inline int64_t bytes_of_b(const LoraSite& site, int64_t out) {
  return site.coded() ? (out + 15) / 16 * ((site.rank + 3) / 4) * 64 : site.rank * out * 2;
}

enum Type : int32_t { FLOAT32 = 0, BFLOAT16, FLOAT16 };

// A module's A [rank, in] or B [out, rank] as it was read, and where its codes go. Strides are in values.
struct Factor {
  const void* values;
  uint8_t* codes;
  int64_t width, rank_stride, stride;  // width: in or out
  int32_t type;
};

struct LoraSource {
  Factor a, b;
  float* units;
  int64_t rank;
};

// What becomes of a step. But for NO_MEMORY, what is wrong with one that is not run; mirrored in bindings.py.
enum Outcome : int32_t { DONE = 0, NO_MEMORY, NO_CACHE, BAD_TOKEN, BAD_POSITION, BAD_BLOCK, BAD_ROW, EMPTY_SLOT };

// server/engine/batch.py's Batch; the mixes are flat: sequence s has entries mix_start[s] to mix_start[s+1].
struct Step {
  int64_t rows, sequences, table_width, logit_count;
  const int64_t* tokens;
  const int64_t* positions;
  const int32_t* row_start;
  const int32_t* context;
  const int32_t* blocks;
  const int64_t* logit_rows;
  const int32_t* mix_start;
  const int32_t* mix_slot;
  const float* mix_weight;
  float* logits;     // [logit_count, vocab]
  int64_t* largest;  // [logit_count]: the first largest of each row, -1 if one of it is not finite
};

}  // namespace loramux
