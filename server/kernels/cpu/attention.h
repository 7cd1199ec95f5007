// Causal attention over KV cache blocks in bf16, accumulated in float32. The order of accumulation depends on the
// token's index only, not on tiles, batches or blocks.
#pragma once
#include "target.h"

#include <cstdint>

#include "gemm.h"
#include "kernels.h"

namespace loramux {

constexpr int PREFETCH_BLOCKS = 4;         // cache blocks to prefetch
constexpr int QUERIES = HAS_AMX ? 16 : 8;  // queries of one KV head that share a pass over its keys

// The KV cache of one layer. A block holds, for each KV head, keys as bf16 [size/16][dim/2][16][2] and values as bf16
// [size/2][padded dim][2]: a vector has 16 tokens' pairs of dimensions, or 16 dimensions of a pair of tokens. All
// layers of a block are adjacent, so that blocks in use fill whole huge pages.
struct Cache {
  uint16_t* data;
  int64_t stride, size, dim;  // stride: values between blocks; size: tokens of a block, a multiple of 16

  int64_t padded() const { return (dim + 15) / 16 * 16; }
  int64_t head_values() const { return size * (dim + padded()); }
  uint16_t* keys(int64_t block, int64_t head) const { return data + block * stride + head * head_values(); }
  uint16_t* values(int64_t block, int64_t head) const { return keys(block, head) + size * dim; }
};

// Writes a token's key and value [dim] of one head. If `last`, no later token of the sequence is in this step, so the
// unused half of a new pair of values is cleared.
void write_token(const Cache& cache, int64_t block, int64_t head, int64_t offset, const float* key, const float* value,
                 bool last);

// Scratch memory of one thread for `attend`.
struct AttentionScratch {
  static constexpr int64_t BYTES_PER_TOKEN = QUERIES * (sizeof(float) + sizeof(uint16_t));  // bytes of scores and probs

  Buffer<float> scores;      // [QUERIES][context padded to 32]; with AMX, probs as float afterwards
  Buffer<uint16_t> probs;    // [QUERIES][context padded to 32], bf16
  Buffer<uint16_t> queries;  // [QUERIES][dim], bf16, for AMX
  Buffer<float> floats;      // [QUERIES][dim], for vector instructions in the AMX build
  void reserve(int64_t context, int64_t dim) {
    const int64_t padded_context = (context + 31) / 32 * 32;
    scores.reserve(QUERIES * padded_context);
    probs.reserve(QUERIES * padded_context);
    if (HAS_AMX) queries.reserve(QUERIES * dim), floats.reserve(QUERIES * dim);
  }
  int64_t bytes() const { return scores.bytes() + probs.bytes() + queries.bytes() + floats.bytes(); }
};

// out[i] [dim] for `count` <= QUERIES queries q[i] (bf16 [dim]) of one head. Query i sees tokens 0..position[i].
// `blocks` is the sequence's block table; `next_blocks` [PREFETCH_BLOCKS] are blocks to prefetch for the task after
// this.
void attend(const Cache& cache, const int32_t* blocks, int64_t head, int count, const uint16_t* const* q,
            const int64_t* position, float scale, AttentionScratch& scratch, float* const* out,
            const uint16_t* const* next_blocks);

}  // namespace loramux
