#include "layer_runner.h"

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <numeric>

#include "simd.h"

namespace loramux {
namespace {

// Most lines to prefetch per group of inputs, weights included, or per span with AMX: a bound of memory bandwidth.
constexpr int64_t MAX_LINES_PER_GROUP = 9, MAX_LINES_PER_SPAN = 20;

// Divisor of the reduced prefetch rate, for machines with less bandwidth, where GEMMs would wait for prefetches longer
// than these save.
constexpr int64_t RATE_DIVISOR = 4;

// Prefetch rate for the adapters of an update; most are in the L3 cache already.
constexpr int64_t UPDATE_RATE = 16;

// Rows up to which a thread prefetches activations and results that other cores wrote. This pays off where cores do not
// share an L3 cache.
constexpr int64_t PREFETCH_ROWS = 32;

constexpr int64_t MIN_TILES = 2;  // least tiles of 16 columns per chunk of a GEMM
constexpr int64_t MAX_TILES = 6;  // most tiles per chunk; AMX overlaps a tile's end with the next one's start

// Prefetches a line for writing.
inline void prefetch_write(const void* p) { __builtin_prefetch(p, 1, 3); }

int64_t whole_tiles(int64_t n) { return (n + 15) / 16 * 16; }

// Rotary positions: rotates elements i and i + d/2.
void rotate(float* x, const float* cosine, const float* sine, int64_t dim) {
  const int64_t half = dim / 2;
  for (int64_t i = 0; i < half; i += 16) {
    const __mmask16 mask = first_lanes(half - i);
    const __m512 a = _mm512_maskz_loadu_ps(mask, x + i), b = _mm512_maskz_loadu_ps(mask, x + half + i);
    const __m512 c = _mm512_maskz_loadu_ps(mask, cosine + i), s = _mm512_maskz_loadu_ps(mask, sine + i);
    _mm512_mask_storeu_ps(x + i, mask, _mm512_fnmadd_ps(b, s, _mm512_mul_ps(a, c)));
    _mm512_mask_storeu_ps(x + half + i, mask, _mm512_fmadd_ps(a, s, _mm512_mul_ps(b, c)));
  }
}

}  // namespace

LayerRunner::LayerRunner(const ModelData& base, ThreadPool* pool)
    : data_(base), pool_(pool), local_(static_cast<size_t>(pool == nullptr ? 1 : pool->threads())) {
  for (size_t t = 0; t < local_.size(); t++)
    local_[t].prefetcher.runner = this, local_[t].prefetcher.thread = static_cast<int>(t);
}

void LayerRunner::begin(const Step& step, const std::vector<int32_t>& row_sequence, std::vector<RowBlock> blocks,
                        float* stream) {
  row_sequence_ = &row_sequence;
  blocks_ = std::move(blocks);
  stream_ = stream;
  reserve(step);
  plan_prefetch(step);
}

void LayerRunner::layer(const Step& step, int64_t layer) {
  for (const RowBlock& block : blocks_) run_layer(step, layer, block);
}

void LayerRunner::reserve(const Step& step) {
  const Config& config = data_.config;
  const int64_t heads = config.heads * config.head_dim, kv = config.kv_heads * config.head_dim;
  int64_t rows = 0, rank = 0, context = 0;
  uint32_t modules = 0;
  for (const RowBlock& block : blocks_) {
    rows = std::max(rows, block.count);
    rank = std::max(rank, block.plan.rank);
    modules |= block.plan.modules;
    for (int64_t r = block.first; r < block.first + block.count; r++)
      context = std::max(context, step.positions[r] + 1);
  }
  const auto reserve = [&](Activations& x, int64_t k, std::initializer_list<int> readers) {
    ActivationFormats formats;
    bool updated = false;
    for (const int module : readers) {
      formats = formats | data_.formats[static_cast<size_t>(module)];
      updated = updated || (modules >> module & 1) != 0;
    }
    if (updated) {  // all modules of an adapter share one format
      formats.bf16 = formats.bf16 || data_.any_format.bf16;
      const bool quarters = (data_.any_format.codes || data_.any_format.split16) && !formats.split16;
      formats = formats | ActivationFormats{quarters, quarters};
    }
    x.reserve(rows, k, formats);
  };
  qkv_.reserve(rows * (whole_tiles(heads) + 2 * whole_tiles(kv)));
  query_.reserve(rows * heads);
  attention_out_.reserve(rows * heads);
  reserve(qkv_in_, config.hidden, {Q, K, V});
  reserve(o_in_, heads, {O});
  reserve(mlp_in_, config.hidden, {GATE, UP});
  reserve(down_in_, config.intermediate, {DOWN});
  if (down_in_.formats.split16) mlp_hidden_.reserve(rows * whole_tiles(config.intermediate));
  for (size_t module = 0; module < MODULES; module++)
    if (modules >> module & 1) updates_[module].reserve(rows * whole_tiles(data_.layers[0].module[module].n));
  for (Local& local : local_) {
    local.attention.reserve(context, config.head_dim);
    local.tile.reserve(rows * 2 * SPAN);
    local.rows.reserve(ROWS * config.hidden);
    local.update.reserve(update_floats(rank));
  }
}

int64_t LayerRunner::bytes() const {
  int64_t bytes = qkv_.bytes() + query_.bytes() + attention_out_.bytes() + mlp_hidden_.bytes();
  for (const Activations* x : {&qkv_in_, &o_in_, &mlp_in_, &down_in_}) bytes += x->bytes();
  for (const auto& buffer : updates_) bytes += buffer.bytes();
  for (const Local& local : local_)
    bytes += local.attention.bytes() + local.tile.bytes() + local.rows.bytes() + local.update.bytes();
  return bytes;
}

int64_t LayerRunner::clock(Phase phase, int64_t since) {
  const int64_t t = now();
  times_[phase] += t - since;
  return t;
}

// Lists the tasks that compute the updates of `modules`; returns their number.
int LayerRunner::plan_updates(int64_t layer, const RowBlock& block, const std::vector<int>& modules) {
  updated_modules_.clear();
  for (const int module : modules) {
    if (!(block.plan.modules >> module & 1)) continue;
    const Matrix& w = data_.layers[static_cast<size_t>(layer)].module[module];
    updated_modules_.push_back(
        {layer * MODULES + module, updates_[static_cast<size_t>(module)].get(), whole_tiles(w.n), w.k, w.n});
  }
  loramux::plan_updates(block.plan, data_.slots, updated_modules_, update_tasks_);
  if (update_tasks_.empty()) updated_modules_.clear();
  return static_cast<int>(update_tasks_.size());
}

void LayerRunner::update_chunk(const Activations& x, int chunk, int thread) {
  loramux::update(update_tasks_[static_cast<size_t>(chunk)], data_.slots, updated_modules_, x,
                  local_[static_cast<size_t>(thread)].update.get());
}

// The last update of a row's output in a module, or null.
const float* LayerRunner::update_of(const RowBlock& block, int module, int64_t row) const {
  if (!block.plan.mixed[static_cast<size_t>(row)]) return nullptr;
  for (const LoraUpdate& update : updated_modules_)
    if (update.at % MODULES == module) return update.z + row * update.stride;
  return nullptr;
}

// ---- prefetching for the next layer ------------------------------------------------------

// Collects what layers read besides weights: adapters and KV cache blocks.
void LayerRunner::plan_prefetch(const Step& step) {
  prefetch_slots_.clear();
  prefetch_blocks_.clear();
  start_prefetch(-1);
  prefetch_rate_ = 0;
  // With many rows GEMMs take so long that these reads do not matter.
  if (blocks_.size() != 1 || !should_prefetch(blocks_[0].count)) return;
  for (const MixRows& mix : blocks_[0].plan.mixes)
    for (const MixEntry& entry : mix.entries) prefetch_slots_.push_back(entry.slot);
  const RowBlock& block = blocks_[0];
  const int64_t last = (*row_sequence_)[static_cast<size_t>(block.first + block.count - 1)];
  for (int64_t s = (*row_sequence_)[static_cast<size_t>(block.first)]; s <= last; s++)
    for (int64_t b = 0; b < step.table_width && b * data_.block_size < step.context[s]; b++)
      prefetch_blocks_.push_back(step.blocks[s * step.table_width + b]);
  prefetch_rate_ = full_rate(block.count);
}

// AMX loads unpacked weights through the same line fill buffers that prefetches occupy. With more than 8 rows it loses
// as much as prefetching saves.
bool LayerRunner::should_prefetch(int64_t rows) const {
  return !data_.layers[0].module[GATE].uses_amx() || 2 * rows <= AMX_ROWS;
}

// Lines per group that spread the prefetches over gate, up and down, which take most of the time. Weights are
// prefetched too and come first.
int64_t LayerRunner::full_rate(int64_t rows) const {
  int64_t lines = static_cast<int64_t>(prefetch_blocks_.size()) * data_.block_values() / 32;
  for (const int32_t slot : prefetch_slots_)
    lines += data_.slots[static_cast<size_t>(slot)].cache_lines / data_.config.layers;
  lines = std::min(lines, data_.prefetch_budget * static_cast<int64_t>(local_.size()));
  int64_t steps = 0, weights = 0, max_lines = 0;
  for (const int module : {GATE, UP, DOWN}) {
    const Matrix& w = data_.layers[0].module[module];
    const int64_t chunks = (w.tiles() + MIN_TILES - 1) / MIN_TILES, groups = w.padded() / GROUP;
    const int64_t each = w.uses_amx() ? (groups + 1) / 2 : groups * passes_over(rows);
    steps += chunks * each;
    max_lines +=
        chunks * (w.uses_amx() ? each * MAX_LINES_PER_SPAN : groups * ((rows + ROWS - 1) / ROWS) * MAX_LINES_PER_GROUP);
    weights += chunks * groups * MIN_TILES * bytes_of_group(w.scheme) / 64;
  }
  const int64_t spare_rate = (max_lines - weights) / steps;
  return std::max<int64_t>(0, std::min(spare_rate, (lines + steps - 1) / steps));
}

// AMX prefetches eight lines per span at any rate.
int64_t LayerRunner::reduced_rate() const {
  return data_.layers[0].module[GATE].uses_amx() ? prefetch_rate_ : (prefetch_rate_ + RATE_DIVISOR - 1) / RATE_DIVISOR;
}

// GEMMs prefetch for `layer` from now on; for nothing if it does not exist.
void LayerRunner::start_prefetch(int64_t layer) {
  prefetch_epoch_++;
  prefetch_layer_ = layer < data_.config.layers ? layer : -1;
}

// A thread's prefetcher for a GEMM. `update` is the next update task of this phase on this thread, if any.
Prefetcher& LayerRunner::prefetcher_for(int thread, int update) {
  LayerPrefetcher& prefetcher = local_[static_cast<size_t>(thread)].prefetcher;
  if (prefetcher.epoch != prefetch_epoch_) {
    prefetcher.epoch = prefetch_epoch_;
    prefetcher.for_update = false;
    prefetcher.lines = prefetcher.next_layer_lines = {};
    prefetcher.rate = prefetch_rate_;
    prefetcher.issued = 0;
    prefetcher.budget = data_.prefetch_budget;
  }
  if (prefetcher.phase == phase_ && prefetcher.update == update) return prefetcher;
  if (!prefetcher.for_update) prefetcher.next_layer_lines = prefetcher.lines;
  prefetcher.for_update = true;
  prefetcher.lines = {};
  prefetcher.phase = phase_;
  prefetcher.update = update;
  prefetcher.entry = prefetcher.end = nullptr;
  if (update == NO_UPDATE) return prefetcher;
  const MixRows* mix = update_tasks_[static_cast<size_t>(update)].mix;
  if (update > 0 && update_tasks_[static_cast<size_t>(update) - 1].mix == mix)
    return prefetcher;  // its adapter was just read
  prefetcher.entry = mix->entries.data();
  prefetcher.end = prefetcher.entry + mix->entries.size();
  return prefetcher;
}

// The memory of an adapter that the updates of this phase read.
CacheLines LayerRunner::update_lines(int32_t slot) const {
  uint32_t which = 0;
  for (const LoraUpdate& update : updated_modules_) which |= 1u << update.at % MODULES;
  const auto layer = static_cast<size_t>(updated_modules_[0].at / MODULES);
  return cache_lines_of(data_.slots[static_cast<size_t>(slot)].modules.data() + layer * MODULES, data_.layers[layer],
                        which);
}

// Each thread prefetches the share of the next layer's data that it will probably read itself, because tasks are
// assigned in the same order.
void LayerRunner::refill(LayerPrefetcher& prefetcher) const {
  if (prefetcher.for_update) {
    prefetcher.rate = UPDATE_RATE;
    while (prefetcher.lines.count == 0 && prefetcher.entry != prefetcher.end)
      prefetcher.lines = update_lines((prefetcher.entry++)->slot);
    if (prefetcher.lines.count > 0) return;
    prefetcher.for_update = false;
    prefetcher.rate = prefetch_rate_;
    prefetcher.lines = prefetcher.next_layer_lines;
  }
  if (prefetch_layer_ < 0) return;
  const auto threads = static_cast<int64_t>(local_.size());
  const auto begin = [&](const std::vector<int32_t>& all) {
    return static_cast<int64_t>(all.size()) * prefetcher.thread / threads;
  };
  const auto count = [&](const std::vector<int32_t>& all) {
    return static_cast<int64_t>(all.size()) * (prefetcher.thread + 1) / threads - begin(all);
  };
  while (prefetcher.lines.count == 0 && prefetcher.budget > 0) {
    const int64_t slot = prefetcher.issued, block = slot - count(prefetch_slots_);
    if (block >= count(prefetch_blocks_)) break;
    prefetcher.issued++;
    if (block < 0) {
      const auto at = static_cast<size_t>(prefetch_slots_[static_cast<size_t>(begin(prefetch_slots_) + slot)]);
      const Layer& layer = data_.layers[static_cast<size_t>(prefetch_layer_)];
      prefetcher.lines =
          cache_lines_of(data_.slots[at].modules.data() + prefetch_layer_ * MODULES, layer, ATTENTION_MODULES);
    } else {
      const int32_t at = prefetch_blocks_[static_cast<size_t>(begin(prefetch_blocks_) + block)];
      const int64_t halves = data_.block_values();
      prefetcher.lines = {reinterpret_cast<const char*>(data_.cache_of(prefetch_layer_).keys(at, 0)), halves / 32};
    }
    prefetcher.lines.count = std::min(prefetcher.lines.count, prefetcher.budget);
    prefetcher.budget -= prefetcher.lines.count;
  }
}

// ---- linears -----------------------------------------------------------------------------

// Prefetches activations once per phase, for few rows.
void LayerRunner::prefetch_activations(const Activations& x, int64_t rows, int thread) {
  Local& local = local_[static_cast<size_t>(thread)];
  if (local.phase == phase_) return;
  local.phase = phase_;
  if (pool_ != nullptr && rows <= PREFETCH_ROWS) x.fetch(rows);
}

void LayerRunner::gemm_chunk(const Matrix& w, const RowBlock& block, const Activations& x, const Output& output,
                             int64_t first, int64_t last, Prefetcher& prefetcher, int thread) {
  const int64_t column = first * 16, columns = std::min(last * 16, w.n) - column;
  // Whole tiles are written in place; results that are added go through the thread's own buffer.
  float* y = output.add ? local_[static_cast<size_t>(thread)].tile.get() : output.out + column;
  const int64_t stride = output.add ? MAX_TILES * 16 : output.stride;
  if (block.count <= PREFETCH_ROWS)  // arrives while the GEMM runs
    for (int64_t r = 0; r < block.count; r++)
      for (int64_t c = 0; c < columns; c += 16) prefetch_write(output.out + r * output.stride + column + c);
  multiply(w, first, last, x, block.count, y, stride, prefetcher);
  if (w.bias)
    for (int64_t r = 0; r < block.count; r++) add_row(y + r * stride, w.bias + column, columns);
  if (!output.add) return;
  for (int64_t r = 0; r < block.count; r++) add_row(output.out + r * output.stride + column, y + r * stride, columns);
}

// Interleaves the base's GEMMs with the adapters' updates: GEMMs are bound by arithmetic and prefetch what the next
// update reads. Whoever reads the result adds the updates.
void LayerRunner::gemms(int64_t layer, const RowBlock& block, const Activations& x,
                        const std::vector<Output>& outputs) {
  const Matrix* of = data_.layers[static_cast<size_t>(layer)].module;
  std::vector<int> modules;
  std::array<int64_t, 4> start{};
  int64_t tiles = 0;
  for (const Output& output : outputs) tiles += of[output.module].tiles();
  const auto threads = static_cast<int64_t>(local_.size());
  const int64_t each =
      of[outputs[0].module].uses_amx() ? std::clamp(tiles / (3 * threads) / 2 * 2, MIN_TILES, MAX_TILES) : MIN_TILES;
  for (size_t i = 0; i < outputs.size(); i++) {
    modules.push_back(outputs[i].module);
    start[i + 1] = start[i] + (of[outputs[i].module].tiles() + each - 1) / each;
  }
  const int updates = plan_updates(layer, block, modules);
  const int gemms = static_cast<int>(start[outputs.size()]);
  const auto updates_before = [&](int chunk) {
    return static_cast<int>(static_cast<int64_t>(chunk) * updates / (updates + gemms));
  };
  phase_++;
  run(updates + gemms, [&](int chunk, int thread) {
    const int update = updates_before(chunk);  // updates in earlier chunks
    if (updates_before(chunk + 1) > update) return update_chunk(x, update, thread);
    const int gemm = chunk - update;
    prefetch_activations(x, block.count, thread);
    size_t i = 0;
    while (gemm >= start[i + 1]) i++;
    const Matrix& w = of[outputs[i].module];
    const int64_t first = (gemm - start[i]) * each;
    gemm_chunk(w, block, x, outputs[i], first, std::min(first + each, w.tiles()),
               prefetcher_for(thread, update < updates ? update : NO_UPDATE), thread);
  });
}

// Quantizes whole rows [rows, k] to split16 if wanted: their maxima must be known.
void LayerRunner::quantize_split16(Activations& x, int64_t rows, int64_t k, const float* from) {
  if (!x.formats.split16) return;
  run(static_cast<int>((rows + ROWS - 1) / ROWS), [&](int chunk, int) {
    const int64_t first = chunk * ROWS;
    x.set_split16(first, std::min<int64_t>(ROWS, rows - first), k, from + first * k, k);
  });
}

// down's input: silu(gate) * up, a span of columns at a time.
void LayerRunner::gate_up(int64_t layer, const RowBlock& block) {
  const Matrix& gate = data_.layers[static_cast<size_t>(layer)].module[GATE];
  const Matrix& up = data_.layers[static_cast<size_t>(layer)].module[UP];
  const int updates = plan_updates(layer, block, {GATE, UP});
  if (updates > 0) run(updates, [&](int chunk, int thread) { update_chunk(mlp_in_, chunk, thread); });
  constexpr int64_t WIDE = SPAN, FORCE_INLINE = WIDE / 16;
  phase_++;
  run(static_cast<int>((gate.tiles() + FORCE_INLINE - 1) / FORCE_INLINE), [&](int chunk, int thread) {
    const int64_t first = chunk * FORCE_INLINE, last = std::min(first + FORCE_INLINE, gate.tiles());
    const int64_t column = first * 16, columns = std::min(last * 16, gate.n) - column;
    float* y = local_[static_cast<size_t>(thread)].tile.get();
    prefetch_activations(mlp_in_, block.count, thread);
    for (int side = 0; side < 2; side++) {
      const Matrix& w = side == 0 ? gate : up;
      float* to = y + side * WIDE;
      multiply(w, first, last, mlp_in_, block.count, to, 2 * WIDE, prefetcher_for(thread));
      for (int64_t r = 0; r < block.count; r++) {
        if (w.bias) add_row(to + r * 2 * WIDE, w.bias + column, columns);
        const float* z = updates > 0 ? update_of(block, side == 0 ? GATE : UP, r) : nullptr;
        if (z) add_row(to + r * 2 * WIDE, z + column, columns);
      }
    }
    for (int64_t r = 0; r < block.count; r++) {
      float* g = y + r * 2 * WIDE;
      for (int64_t c = 0; c < WIDE; c += 16)
        _mm512_storeu_ps(g + c, _mm512_mul_ps(silu(_mm512_loadu_ps(g + c)), _mm512_loadu_ps(g + WIDE + c)));
      if (down_in_.formats.split16) copy_row(mlp_hidden_.get() + r * data_.config.intermediate + column, g, columns);
    }
    down_in_.set(0, block.count, column, column + columns, y, 2 * WIDE);
  });
  quantize_split16(down_in_, block.count, data_.config.intermediate, mlp_hidden_.get());
}

// Adds down's updates to the residual stream here, because no later phase does.
void LayerRunner::down(int64_t layer, const RowBlock& block) {
  float* stream = stream_ + block.first * data_.config.hidden;
  gemms(layer, block, down_in_, {{DOWN, stream, data_.config.hidden, true}});
  if (updated_modules_.empty()) return;
  run(static_cast<int>((block.count + ROWS - 1) / ROWS), [&](int chunk, int) {
    for (int64_t r = chunk * ROWS; r < std::min<int64_t>(block.count, (chunk + 1) * ROWS); r++)
      if (const float* z = update_of(block, DOWN, r)) add_row(stream + r * data_.config.hidden, z, data_.config.hidden);
  });
}

// RMSNorm of the residual stream into `to`, after adding the updates of module `added` (MODULES for none).
void LayerRunner::norm_rows(const RowBlock& block, const float* weight, int updated_module, Activations& to) {
  const int chunks = static_cast<int>((block.count + ROWS - 1) / ROWS);
  const int64_t hidden = data_.config.hidden;
  run(chunks, [&](int chunk, int thread) {
    const int64_t first = chunk * ROWS, last = std::min<int64_t>(block.count, first + ROWS);
    float* scratch = local_[static_cast<size_t>(thread)].rows.get();
    const auto prefetch_row = [&](int64_t r) {  // other threads wrote half of it
      for (int64_t i = 0; i < hidden; i += 16)
        _mm_prefetch(reinterpret_cast<const char*>(stream_ + (block.first + r) * hidden + i), _MM_HINT_T0);
    };
    prefetch_row(first);
    for (int64_t r = first; r < last; r++) {
      if (r + 1 < last) prefetch_row(r + 1);
      float* x = stream_ + (block.first + r) * hidden;
      const float* z = updated_module == MODULES ? nullptr : update_of(block, updated_module, r);
      if (z) add_row(x, z, hidden);
      rms_norm(x, weight, hidden, static_cast<float>(data_.config.eps), scratch + (r - first) * hidden);
    }
    to.set_rows(first, last - first, hidden, scratch, hidden);
  });
}

// ---- attention ---------------------------------------------------------------------------

// Prepares a KV head of a row and its query heads: updates, norms, rotary positions, cache write.
void LayerRunner::rotate_and_write(const Step& step, int64_t layer, const RowBlock& block, int64_t row, int64_t head) {
  const int64_t dim = data_.config.head_dim, group = data_.config.heads / data_.config.kv_heads;
  const int64_t heads = data_.config.heads * dim, kv = data_.config.kv_heads * dim;
  const int64_t stride = whole_tiles(heads) + 2 * whole_tiles(kv);
  const Layer& l = data_.layers[static_cast<size_t>(layer)];
  float* q = qkv_.get() + row * stride;
  float* k = q + whole_tiles(heads) + head * dim;
  float* v = q + whole_tiles(heads) + whole_tiles(kv) + head * dim;
  const int64_t position = step.positions[block.first + row];
  const float* cosine = data_.cosine + position * (dim / 2);
  const float* sine = data_.sine + position * (dim / 2);
  const auto eps = static_cast<float>(data_.config.eps);
  if (const float* z = update_of(block, Q, row)) add_row(q + head * group * dim, z + head * group * dim, group * dim);
  if (const float* z = update_of(block, K, row)) add_row(k, z + head * dim, dim);
  if (const float* z = update_of(block, V, row)) add_row(v, z + head * dim, dim);
  for (int64_t h = head * group; h < (head + 1) * group; h++) {
    float* x = q + h * dim;
    if (l.q_norm) rms_norm(x, l.q_norm, dim, eps, x);
    if (l.rope) rotate(x, cosine, sine, dim);
    uint16_t* to = query_.get() + row * heads + h * dim;
    for (int64_t i = 0; i < dim; i += 16) {
      const __mmask16 mask = first_lanes(dim - i);
      _mm256_mask_storeu_epi16(to + i, mask, float_to_bf16(_mm512_maskz_loadu_ps(mask, x + i)));
    }
  }
  if (l.k_norm) rms_norm(k, l.k_norm, dim, eps, k);
  if (l.rope) rotate(k, cosine, sine, dim);
  const int32_t s = (*row_sequence_)[static_cast<size_t>(block.first + row)];
  const int32_t* table = step.blocks + s * step.table_width;
  // Attention may read this block before the next row is written.
  const bool last = row + 1 == block.count || block.first + row + 1 == step.row_start[s + 1];
  write_token(data_.cache_of(layer), table[position / data_.block_size], head, position % data_.block_size, k, v, last);
}

// Prefetches what `rotate_and_write` reads next.
void LayerRunner::prefetch_heads(int64_t row, int64_t head) {
  const int64_t dim = data_.config.head_dim, group = data_.config.heads / data_.config.kv_heads;
  const int64_t heads = data_.config.heads * dim, kv = data_.config.kv_heads * dim;
  const float* q = qkv_.get() + row * (whole_tiles(heads) + 2 * whole_tiles(kv));
  const float* k = q + whole_tiles(heads) + head * dim;
  for (int64_t i = 0; i < group * dim; i += 16) prefetch_write(q + head * group * dim + i);
  for (int64_t i = 0; i < dim; i += 16) prefetch_write(k + i), prefetch_write(k + whole_tiles(kv) + i);
}

// Attention for rows first..last of a sequence and one KV head. Quantizes the result to `o_in_` if it is a whole number
// of spans.
void LayerRunner::attend_rows(const Step& step, int64_t layer, const RowBlock& block, int64_t sequence, int64_t head,
                              int64_t first, int64_t last, int thread, const uint16_t* const* next_blocks) {
  const int64_t dim = data_.config.head_dim, group = data_.config.heads / data_.config.kv_heads,
                heads = data_.config.heads * dim;
  const float scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(dim)));
  const int32_t* table = step.blocks + sequence * step.table_width;
  const int64_t count = (last - first) * group;
  for (int64_t i = 0; i < count; i += QUERIES) {
    const int some = static_cast<int>(std::min<int64_t>(QUERIES, count - i));
    const uint16_t* q[QUERIES];
    int64_t position[QUERIES];
    float* out[QUERIES];
    for (int n = 0; n < some; n++) {
      const int64_t row = first + (i + n) / group, h = head * group + (i + n) % group;
      q[n] = query_.get() + row * heads + h * dim;
      position[n] = step.positions[block.first + row];
      out[n] = attention_out_.get() + row * heads + h * dim;
    }
    attend(data_.cache_of(layer), table, head, some, q, position, scale, local_[static_cast<size_t>(thread)].attention,
           out, next_blocks);
  }
  if (group * dim % SPAN) return;
  const int64_t from = head * group * dim;
  o_in_.set(first, last - first, from, from + group * dim, attention_out_.get() + first * heads + from, heads);
}

void LayerRunner::attention(const Step& step, int64_t layer, const RowBlock& block) {
  struct Task {
    int32_t sequence, first, last;
  };
  thread_local std::vector<Task> tasks;
  tasks.clear();
  bool single = true;  // no row reads what another row of this block writes
  const int64_t kv_heads = data_.config.kv_heads;
  // Rows of a task: at least eight, or as many as fill QUERIES.
  const int64_t each = std::max<int64_t>(8, QUERIES / std::gcd<int64_t>(QUERIES, data_.config.heads / kv_heads));
  for (int64_t row = 0; row < block.count;) {
    const int32_t s = (*row_sequence_)[static_cast<size_t>(block.first + row)];
    const int64_t end = std::min<int64_t>(block.count, step.row_start[s + 1] - block.first);
    single = single && end == row + 1;
    for (; row < end; row += each)
      tasks.push_back({s, static_cast<int32_t>(row), static_cast<int32_t>(std::min<int64_t>(end, row + each))});
    row = end;
  }
  if (!single)
    run(static_cast<int>((block.count + ROWS - 1) / ROWS), [&](int chunk, int) {
      for (int64_t r = chunk * ROWS; r < std::min<int64_t>(block.count, (chunk + 1) * ROWS); r++)
        for (int64_t head = 0; head < kv_heads; head++) rotate_and_write(step, layer, block, r, head);
    });
  const Cache cache = data_.cache_of(layer);
  const auto* all = tasks.data();
  const auto chunks = static_cast<int64_t>(tasks.size()) * kv_heads;
  run(static_cast<int>(chunks), [&](int chunk, int thread) {
    const Task& task = all[chunk / kv_heads];
    const int64_t head = chunk % kv_heads;
    const Task& later = all[std::min<int64_t>(chunk + 1, chunks - 1) / kv_heads];
    if (single) {
      rotate_and_write(step, layer, block, task.first, head);
      prefetch_heads(later.first, (head + 1) % kv_heads);
    }
    const int32_t* table = step.blocks + later.sequence * step.table_width;
    const uint16_t* next_blocks[PREFETCH_BLOCKS];
    for (int64_t i = 0; i < PREFETCH_BLOCKS; i++)
      next_blocks[i] = cache.keys(table[i < step.table_width && table[i] >= 0 ? i : 0], (head + 1) % kv_heads);
    attend_rows(step, layer, block, task.sequence, head, task.first, task.last, thread, next_blocks);
  });
  const int64_t heads = data_.config.heads * data_.config.head_dim;
  quantize_split16(o_in_, block.count, heads, attention_out_.get());
  if (data_.config.heads / data_.config.kv_heads * data_.config.head_dim % SPAN == 0) return;
  run(static_cast<int>((block.count + ROWS - 1) / ROWS), [&](int chunk, int) {
    const int64_t first = chunk * ROWS, some = std::min<int64_t>(ROWS, block.count - first);
    o_in_.set(first, some, 0, heads, attention_out_.get() + first * heads, heads);
  });
}

// ---- a layer -----------------------------------------------------------------------------

void LayerRunner::run_layer(const Step& step, int64_t layer, const RowBlock& block) {
  const Layer& l = data_.layers[static_cast<size_t>(layer)];
  const int64_t heads = data_.config.heads * data_.config.head_dim, kv = data_.config.kv_heads * data_.config.head_dim;
  const int64_t stride = whole_tiles(heads) + 2 * whole_tiles(kv);
  float* stream = stream_ + block.first * data_.config.hidden;
  int64_t t = now();

  norm_rows(block, l.input_norm, MODULES, qkv_in_);
  t = clock(NORM, t);
  gemms(layer, block, qkv_in_,
        {{Q, qkv_.get(), stride, false},
         {K, qkv_.get() + whole_tiles(heads), stride, false},
         {V, qkv_.get() + whole_tiles(heads) + whole_tiles(kv), stride, false}});
  t = clock(QKV, t);
  attention(step, layer, block);
  start_prefetch(layer + 1);
  t = clock(ATTENTION, t);
  gemms(layer, block, o_in_, {{O, stream, data_.config.hidden, true}});
  t = clock(OUT, t);

  norm_rows(block, l.post_norm, O, mlp_in_);
  t = clock(NORM, t);
  gate_up(layer, block);
  t = clock(GATE_UP, t);
  down(layer, block);
  clock(DOWN_PROJ, t);
}

}  // namespace loramux
