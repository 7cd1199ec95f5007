// Structs shared with Python, mirrored field by field in bindings.py. They hold raw pointers; the caller keeps the
// arrays alive.
#pragma once
#include "target.h"

#include <cstdint>

namespace loramux {

enum Scheme : int32_t { INT4 = 0, NF4 = 1, INT8 = 2, NONE = 3 };

// Inputs of quantized matrices, padded to whole groups of 32.
inline int64_t padded_inputs(int64_t in) { return (in + 31) / 32 * 32; }

// A weight matrix [n, k] in tiles of 16 rows (columns of the GEMM's output). kp is k rounded up to 32, tiles is ceil(n
// / 16), g is k / group:
//   codes          INT4, NF4: [tiles][kp/32][4][16][4], byte (s, c, b) has input 4s+b in its low nibble, 16+4s+b in the
//                  high one
//                  INT8: [tiles][kp/32][8][16][4], byte (s, c, b) is the code of input 4s+b plus 128
//                  NONE: bf16 [tiles][kp/2][16][2]
//   scale          float16 [tiles][g][16] (NF4, INT8)
//   span_scales    INT4: int16, integer scales s and z = zero / 8 + s in units of 2^exponent, so that w = (code - 8) s
//                  + 8 z. [tiles][g][2][16] where the group is a multiple of 64, else [tiles][ceil(kp/64)][2][16][2],
//                  zero after k
//   exponents      INT4: int8 [tiles][16]
//   exception_at, exception_values   INT4: groups (int64, ascending, row * g + group) whose scale and zero do not
//   survive this form, and their float16 [exception_count][2]
//   scale_codes, zero_codes   double quantization: uint8 [tiles][g][16], with step and base float [tiles][ceil(g/16)]
//   inverse_scale  bf16 [tiles][16] or null: 1 / the 8-bit scale of each column, for AMX. Null where rounding to it
//                  would lose too much
//   nonnegative_scales   uint8 [1], present if INT4 has an inverse_scale and no negative scale
struct Matrix {
  const uint8_t* codes;
  const uint16_t* scale;
  const int16_t* span_scales;
  const int8_t* exponents;
  const int64_t* exception_at;
  const uint16_t* exception_values;
  const uint8_t* scale_codes;
  const uint8_t* zero_codes;
  const float* scale_step;
  const float* scale_base;
  const float* zero_step;
  const float* zero_base;
  const uint16_t* inverse_scale;
  const uint8_t* nonnegative_scales;
  const float* bias;  // [n] or null
  int64_t n, k, exception_count;
  int32_t scheme, group;
  bool as_int8 = false;  // INT4: multiply as 8-bit weights (AMX)

  bool whole_spans() const { return group % 64 == 0; }
  int64_t span_scale_count() const { return whole_spans() ? k / group : (padded() + 63) / 64; }  // of a tile
  int64_t tiles() const { return (n + 15) / 16; }
  bool has_int_scales() const { return scheme == INT4 && scale_codes == nullptr; }
  bool uses_amx() const { return HAS_AMX && inverse_scale != nullptr; }
  int64_t padded() const { return padded_inputs(k); }
};

enum ModuleIndex : int { Q = 0, K = 1, V = 2, O = 3, GATE = 4, UP = 5, DOWN = 6, MODULES = 7 };

struct Layer {
  Matrix module[MODULES];
  const float* input_norm;
  const float* post_norm;
  const float* q_norm;  // [head_dim] or null
  const float* k_norm;
  int64_t rope;  // 0 for a layer without rotary positions
};

struct Config {
  int64_t hidden, intermediate, layers, heads, kv_heads, head_dim, vocab, max_slots;
  double eps;
};

// One module of an adapter. With int8: a and b are codes plus 128, zero-padded; a in tiles of 16 ranks (a last tile of
// 8 if no more are left) [kp/4][16 or 8][4], b [tiles of 16 columns][ceil(rank/4)][16][4], rank_scales [rank] the
// product of the scales of a rank's row of A and column of B. With bf16: a [rank, in], b [rank, out], and rank_scales
// is null. A rank of 0 means that the adapter lacks the module.
struct LoraModule {
  const float* rank_scales;
  const void* a;
  const void* b;
  int64_t rank;
  double scale;

  bool is_int8() const { return rank_scales != nullptr; }
};

// Ranks of a tile of A, with `left` ranks left. `bytes_of_a` in adapter_codes.py follows the same rule.
inline int64_t ranks_of_tile(int64_t left) { return left > 8 ? 16 : 8; }

inline int64_t bytes_of_b(const LoraModule& module, int64_t out) {
  return module.is_int8() ? (out + 15) / 16 * ((module.rank + 3) / 4) * 64 : module.rank * out * 2;
}

enum DataType : int32_t { FLOAT32 = 0, BFLOAT16, FLOAT16 };

// A module's A [rank, in] or B [out, rank] as loaded, and where its codes go. Strides are in values.
struct LoraFactor {
  const void* values;
  uint8_t* codes;
  int64_t width, rank_stride, stride;  // width: in or out
  int32_t type;
};

struct LoraSource {
  LoraFactor a, b;
  float* rank_scales;
  int64_t rank;
};

// The result of a step. All but DONE and NO_MEMORY mean an invalid step that was not run. Mirrored in bindings.py.
enum Outcome : int32_t { DONE = 0, NO_MEMORY, NO_CACHE, BAD_TOKEN, BAD_POSITION, BAD_BLOCK, BAD_ROW, EMPTY_SLOT };

// A batch (server/engine/batch.py) with flattened mixes: sequence s has entries mix_start[s] to mix_start[s+1].
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
  float* logits;    // [logit_count, vocab]
  int64_t* argmax;  // [logit_count]: first index of each row's maximum, -1 if a logit is not finite
};

}  // namespace loramux
