// What a model holds between steps, and every team reads: the base, the adapters in their slots, the cache.
#pragma once
#include "target.h"

#include <array>
#include <cstdint>
#include <vector>

#include "attention.h"
#include "kernels.h"
#include "lora.h"

namespace loramux {

constexpr uint32_t ATTENTION_SITES = 1u << Q | 1u << K | 1u << V | 1u << O;

// An adapter's matrices of some sites of a layer, which lie one after the other. Bit s of `which`: site s is one.
Lines lines_of(const LoraSite* sites, const Layer& layer, uint32_t which);

int64_t cache_halves(const Config& config, int64_t block_size);  // bf16 values of one block of one layer

struct ModelState {
  const Config config;
  const std::vector<Layer> layers;
  const int64_t ahead_lines;  // that a thread asks for ahead of a layer, at most
  std::array<Forms, SITES> forms;  // that products want of their activations, in any layer
  Forms any;                       // of them

  std::vector<Slot> slots;

  uint16_t* cache = nullptr;
  int64_t blocks = 0, block_size = 16, positions = 0;
  const float* cosine = nullptr;
  const float* sine = nullptr;

  ModelState(const Config& config, const Layer* layers, int threads);
  void set_slot(int64_t slot, std::vector<LoraSite> sites);
  int64_t cache_halves() const { return loramux::cache_halves(config, block_size); }
  Cache cache_of(int64_t layer) const;
};

}  // namespace loramux
