// Causal attention over KV blocks in bf16, with accumulation in float32.
// A query's sums run over tokens 0, 1, 2, ... of its own context, or over sixteens of them (amx_attention.h), whatever the
// tile, the chunk or the blocks.
#pragma once
#include "target.h"

#include <cstdint>

#include "gemm.h"
#include "kernels.h"

namespace loramux {

constexpr int AHEAD = 4;    // blocks that are asked for before they are read
constexpr int QUERIES = MATRIX_UNIT ? 16 : 8;  // of one KV head that walk its keys together

// One layer's cache. A block holds, for each KV head, its keys as [size/16][dim/2][16][2] and its values as
// [size/2][dim padded to 16][2], both bf16: a vector has 16 tokens' pairs of dims, or 16 dims of a pair of tokens. All
// layers of a block lie side by side, so that the blocks in use fill whole pages, huge ones too.
struct Cache {
  uint16_t* data;
  int64_t stride, size, dim;  // values from a block to the next; tokens of a block, a multiple of 16

  int64_t padded() const { return (dim + 15) / 16 * 16; }
  int64_t head_halves() const { return size * (dim + padded()); }
  uint16_t* keys(int64_t block, int64_t head) const { return data + block * stride + head * head_halves(); }
  uint16_t* values(int64_t block, int64_t head) const { return keys(block, head) + size * dim; }
};

// Writes a token's key and value [dim] of one head. `last`: no later token of the sequence is in this step, so that
// the value beside it, if it is the first of a pair, is cleared of what an earlier owner left.
void write_token(const Cache& cache, int64_t block, int64_t head, int64_t offset, const float* key, const float* value,
                 bool last);

// Per-thread room for `attend`.
struct AttentionScratch {
  static constexpr int64_t EACH_TOKEN = QUERIES * (sizeof(float) + sizeof(uint16_t));  // bytes, of the first two

  Buffer<float> scores;      // [QUERIES][context padded to 32], and powers then beside a matrix unit
  Buffer<uint16_t> powers;   // the same, bf16
  Buffer<uint16_t> queries;  // [QUERIES][dim], bf16, of the matrix unit
  Buffer<float> floats;      // the same, of vector instructions in its place
  void reserve(int64_t context, int64_t dim) {
    const int64_t wide = (context + 31) / 32 * 32;
    scores.reserve(QUERIES * wide);
    powers.reserve(QUERIES * wide);
    if (MATRIX_UNIT) queries.reserve(QUERIES * dim), floats.reserve(QUERIES * dim);
  }
  int64_t bytes() const { return scores.bytes() + powers.bytes() + queries.bytes() + floats.bytes(); }
};

// out[i] [dim] for `count` <= QUERIES queries q[i] (bf16 [dim]) of one head, query i seeing tokens 0..position[i].
// `blocks` is the sequence's block table; `following` [AHEAD] are blocks that will be wanted after this.
void attend(const Cache& cache, const int32_t* blocks, int64_t head, int count, const uint16_t* const* q,
            const int64_t* position, float scale, AttentionScratch& scratch, float* const* out, const uint16_t* const* following);

}  // namespace loramux
