// Model data that persists between steps: base weights, adapter slots, KV cache.
#pragma once
#include "target.h"

#include <array>
#include <cstdint>
#include <vector>

#include "attention.h"
#include "kernels.h"
#include "lora.h"

namespace loramux {

constexpr uint32_t ATTENTION_MODULES = 1u << Q | 1u << K | 1u << V | 1u << O;

// Adjacent memory of an adapter's modules of one layer. Bit s of `which` selects module s.
CacheLines cache_lines_of(const LoraModule* modules, const Layer& layer, uint32_t which);

int64_t block_values(const Config& config, int64_t block_size);  // bf16 values of one block of one layer

struct ModelData {
  const Config config;
  const std::vector<Layer> layers;
  const int64_t prefetch_budget;                   // lines that a thread may prefetch per layer
  std::array<ActivationFormats, MODULES> formats;  // activation formats that each module reads, in any layer
  ActivationFormats any_format;                    // union of these

  std::vector<Slot> slots;

  uint16_t* cache = nullptr;
  int64_t blocks = 0, block_size = 16, positions = 0;
  const float* cosine = nullptr;
  const float* sine = nullptr;

  ModelData(const Config& config, const Layer* layers, int threads);
  void set_slot(int64_t slot, std::vector<LoraModule> modules);
  int64_t block_values() const { return loramux::block_values(config, block_size); }
  Cache cache_of(int64_t layer) const;
};

}  // namespace loramux
