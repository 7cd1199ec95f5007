#include "model_state.h"

#include <unistd.h>

#include <algorithm>
#include <utility>

namespace loramux {
namespace {

// What a thread asks for ahead of a layer, at most: it has to stay in its second cache, or in a third of the third one
// that it shares with the others, until it is read.
int64_t ahead_lines(int threads) {
  constexpr int64_t SECOND = 1 << 20;
  const int64_t third = sysconf(_SC_LEVEL3_CACHE_SIZE);
  return std::max(SECOND, third / 3 / threads) / 64;
}

// The layers as steps compute them: gate and up, half of all products, by bytes of weights, in two thirds of the time. Down by
// bytes too is a hundredth of a step less, and twice the error: what it loses goes straight into the stream.
std::vector<Layer> of_steps(const Layer* layers, int64_t count) {
  std::vector<Layer> made(layers, layers + count);
  for (Layer& layer : made)
    for (const int site : {GATE, UP}) layer.site[site].coarse = layer.site[site].rising != nullptr;
  return made;
}

}  // namespace

Lines lines_of(const LoraSite* sites, const Layer& layer, uint32_t which) {
  const char *begin = nullptr, *end = nullptr;
  for (size_t s = 0; s < SITES; s++) {
    const LoraSite& site = sites[s];
    if (!(which >> s & 1) || site.rank == 0) continue;
    const auto* first = static_cast<const char*>(site.coded() ? site.units : site.a);
    if (begin == nullptr || first < begin) begin = first;
    end = std::max(end, static_cast<const char*>(site.b) + bytes_of_b(site, layer.site[s].n));
  }
  return {begin, (end - begin + 63) / 64};
}

int64_t cache_halves(const Config& config, int64_t block_size) {
  return config.kv_heads * Cache{nullptr, 0, block_size, config.head_dim}.head_halves();
}

ModelState::ModelState(const Config& config, const Layer* layers, int threads)
    : config(config),
      layers(of_steps(layers, config.layers)),
      ahead_lines(loramux::ahead_lines(threads)),
      slots(static_cast<size_t>(config.max_slots)) {
  for (const Layer& layer : this->layers)
    for (size_t s = 0; s < SITES; s++) forms[s] = forms[s] | forms_of(layer.site[s]), any = any | forms[s];
}

void ModelState::set_slot(int64_t slot, std::vector<LoraSite> sites) {
  Slot& to = slots[static_cast<size_t>(slot)];
  to = {std::move(sites)};
  if (to.sites.empty()) return;
  for (size_t i = 0; i < to.sites.size(); i++) {
    to.rank = std::max(to.rank, to.sites[i].rank);
    if (to.sites[i].rank > 0) to.uses |= 1u << i % SITES;
  }
  for (size_t layer = 0; layer < layers.size(); layer++)
    to.lines += lines_of(to.sites.data() + layer * SITES, layers[layer], ATTENTION_SITES).count;
}

Cache ModelState::cache_of(int64_t layer) const {
  const int64_t halves = cache_halves();
  return {cache + layer * halves, config.layers * halves, block_size, config.head_dim};
}

}  // namespace loramux
