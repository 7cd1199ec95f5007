#include "model_data.h"

#include <unistd.h>

#include <algorithm>
#include <utility>

namespace loramux {
namespace {

// Lines that a thread may prefetch per layer: what fits in its L2 cache, or in a third of its share of the L3 cache.
int64_t prefetch_budget(int threads) {
  constexpr int64_t SECOND = 1 << 20;
  const int64_t third = sysconf(_SC_LEVEL3_CACHE_SIZE);
  return std::max(SECOND, third / 3 / threads) / 64;
}

// In steps gate and up, half of all GEMM work, use 8-bit weights in two thirds of the time. down stays at 16 bits: it
// would save 1 % of a step and double the error.
std::vector<Layer> step_layers(const Layer* layers, int64_t count) {
  std::vector<Layer> made(layers, layers + count);
  for (Layer& layer : made)
    for (const int module : {GATE, UP})
      layer.module[module].as_int8 = layer.module[module].nonnegative_scales != nullptr;
  return made;
}

}  // namespace

CacheLines cache_lines_of(const LoraModule* modules, const Layer& layer, uint32_t which) {
  const char *begin = nullptr, *end = nullptr;
  for (size_t s = 0; s < MODULES; s++) {
    const LoraModule& module = modules[s];
    if (!(which >> s & 1) || module.rank == 0) continue;
    const auto* first = static_cast<const char*>(module.is_int8() ? module.rank_scales : module.a);
    if (begin == nullptr || first < begin) begin = first;
    end = std::max(end, static_cast<const char*>(module.b) + bytes_of_b(module, layer.module[s].n));
  }
  return {begin, (end - begin + 63) / 64};
}

int64_t block_values(const Config& config, int64_t block_size) {
  return config.kv_heads * Cache{nullptr, 0, block_size, config.head_dim}.head_values();
}

ModelData::ModelData(const Config& config, const Layer* layers, int threads)
    : config(config),
      layers(step_layers(layers, config.layers)),
      prefetch_budget(loramux::prefetch_budget(threads)),
      slots(static_cast<size_t>(config.max_slots)) {
  for (const Layer& layer : this->layers)
    for (size_t s = 0; s < MODULES; s++)
      formats[s] = formats[s] | formats_of(layer.module[s]), any_format = any_format | formats[s];
}

void ModelData::set_slot(int64_t slot, std::vector<LoraModule> modules) {
  Slot& to = slots[static_cast<size_t>(slot)];
  to = {std::move(modules)};
  if (to.modules.empty()) return;
  for (size_t i = 0; i < to.modules.size(); i++) {
    to.rank = std::max(to.rank, to.modules[i].rank);
    if (to.modules[i].rank > 0) to.uses |= 1u << i % MODULES;
  }
  for (size_t layer = 0; layer < layers.size(); layer++)
    to.cache_lines += cache_lines_of(to.modules.data() + layer * MODULES, layers[layer], ATTENTION_MODULES).count;
}

Cache ModelData::cache_of(int64_t layer) const {
  const int64_t halves = block_values();
  return {cache + layer * halves, config.layers * halves, block_size, config.head_dim};
}

}  // namespace loramux
