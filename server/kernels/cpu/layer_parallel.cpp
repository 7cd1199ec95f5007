#include "layer_parallel.h"

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <numeric>

#include "simd.h"

namespace loramux {
namespace {

// What is asked for with a group of inputs, weights among it, at most: memory has no more to give. With a span of them where
// the matrix unit computes.
constexpr int64_t MOST_LINES = 9, MOST_OF_SPAN = 20;

// Where memory has less to give than that, products wait longer for what is asked for beside them than is saved when it is
// read. So lines are asked for at about this part of the pace where that takes less time; the last of them, of keys and
// values, wait until they are read.
constexpr int64_t SPARED = 4;

// The same of an update's adapters: most of them have come as far as the third cache before.
constexpr int64_t MOST_NEAR = 16;

// Rows whose activations, and whose results of a piece, are asked for all at once. A line that another core has written takes
// longer than one from memory where the cores do not share their third cache.
constexpr int64_t FEW = 32;

constexpr int64_t TILES = 2;       // of 16 columns: what one piece of a product computes at least,
constexpr int64_t MOST_TILES = 6;  // and at most, as the matrix unit begins with the next ones while it ends the last

// Asks for a line that will be written: another core may have it.
inline void own_soon(const void* p) { __builtin_prefetch(p, 1, 3); }

int64_t whole_tiles(int64_t n) { return (n + 15) / 16 * 16; }

// Element i turns with element i + d/2.
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

LayerParallel::LayerParallel(const ModelState& base, Pool* pool)
    : base_(base), pool_(pool), local_(static_cast<size_t>(pool == nullptr ? 1 : pool->threads())) {
  for (size_t t = 0; t < local_.size(); t++) local_[t].ahead.team = this, local_[t].ahead.thread = static_cast<int>(t);
}

void LayerParallel::begin(const Step& step, const std::vector<int32_t>& row_sequence, std::vector<RowBlock> blocks,
                 float* stream) {
  row_sequence_ = &row_sequence;
  blocks_ = std::move(blocks);
  stream_ = stream;
  reserve(step);
  plan_ahead(step);
}

void LayerParallel::layer(const Step& step, int64_t layer) {
  for (const RowBlock& block : blocks_) run_layer(step, layer, block);
}

void LayerParallel::reserve(const Step& step) {
  const Config& config = base_.config;
  const int64_t heads = config.heads * config.head_dim, kv = config.kv_heads * config.head_dim;
  int64_t rows = 0, rank = 0, context = 0;
  uint32_t sites = 0;
  for (const RowBlock& block : blocks_) {
    rows = std::max(rows, block.count);
    rank = std::max(rank, block.plan.rank);
    sites |= block.plan.sites;
    for (int64_t r = block.first; r < block.first + block.count; r++)
      context = std::max(context, step.positions[r] + 1);
  }
  const auto reserve = [&](Activations& x, int64_t k, std::initializer_list<int> readers) {
    Forms forms;
    bool updated = false;
    for (const int site : readers) {
      forms = forms | base_.forms[static_cast<size_t>(site)];
      updated = updated || (sites >> site & 1) != 0;
    }
    if (updated) {  // adapters have one form, whatever the matrix beside them has
      forms.half = forms.half || base_.any.half;
      const bool quarters = (base_.any.codes || base_.any.wide) && !forms.wide;
      forms = forms | Forms{quarters, quarters};
    }
    x.reserve(rows, k, forms);
  };
  qkv_.reserve(rows * (whole_tiles(heads) + 2 * whole_tiles(kv)));
  query_.reserve(rows * heads);
  seen_.reserve(rows * heads);
  reserve(entering_, config.hidden, {Q, K, V});
  reserve(attended_, heads, {O});
  reserve(normed_, config.hidden, {GATE, UP});
  reserve(gated_, config.intermediate, {DOWN});
  if (gated_.forms.wide) product_.reserve(rows * whole_tiles(config.intermediate));
  for (size_t site = 0; site < SITES; site++)
    if (sites >> site & 1) updates_[site].reserve(rows * whole_tiles(base_.layers[0].site[site].n));
  for (Local& local : local_) {
    local.attention.reserve(context, config.head_dim);
    local.tile.reserve(rows * 2 * SPAN);
    local.rows.reserve(ROWS * config.hidden);
    local.update.reserve(update_floats(rank));
  }
}

int64_t LayerParallel::bytes() const {
  int64_t bytes = qkv_.bytes() + query_.bytes() + seen_.bytes() + product_.bytes();
  for (const Activations* x : {&entering_, &attended_, &normed_, &gated_}) bytes += x->bytes();
  for (const auto& buffer : updates_) bytes += buffer.bytes();
  for (const Local& local : local_)
    bytes += local.attention.bytes() + local.tile.bytes() + local.rows.bytes() + local.update.bytes();
  return bytes;
}

int64_t LayerParallel::clock(Phase phase, int64_t since) {
  const int64_t t = now();
  times_[phase] += t - since;
  return t;
}

// The tasks that compute the updates of `sites`; how many.
int LayerParallel::plan_updates(int64_t layer, const RowBlock& block, const std::vector<int>& sites) {
  updated_.clear();
  for (const int site : sites) {
    if (!(block.plan.sites >> site & 1)) continue;
    const Matrix& w = base_.layers[static_cast<size_t>(layer)].site[site];
    updated_.push_back({layer * SITES + site, updates_[static_cast<size_t>(site)].get(), whole_tiles(w.n), w.k, w.n});
  }
  loramux::plan_updates(block.plan, base_.slots, updated_, update_tasks_);
  if (update_tasks_.empty()) updated_.clear();
  return static_cast<int>(update_tasks_.size());
}

void LayerParallel::update_piece(const Activations& x, int piece, int thread) {
  loramux::update(update_tasks_[static_cast<size_t>(piece)], base_.slots, updated_, x,
                  local_[static_cast<size_t>(thread)].update.get());
}

// What the last updates add to a row's output at a site, or null.
const float* LayerParallel::update_of(const RowBlock& block, int site, int64_t row) const {
  if (!block.plan.mixed[static_cast<size_t>(row)]) return nullptr;
  for (const Update& update : updated_)
    if (update.at % SITES == site) return update.z + row * update.stride;
  return nullptr;
}

// ---- what the next layer reads --------------------------------------------------------------------------------

// What the layers of a step read beside weights: adapters, and blocks of keys and values.
void LayerParallel::plan_ahead(const Step& step) {
  ahead_slots_.clear();
  ahead_blocks_.clear();
  look_ahead(-1);
  ahead_pace_ = 0;
  // Of many rows the products take so long that what they read does not show.
  if (blocks_.size() != 1 || !worth_asking(blocks_[0].count)) return;
  for (const MixRows& mix : blocks_[0].plan.mixes)
    for (const Entry& entry : mix.entries) ahead_slots_.push_back(entry.slot);
  const RowBlock& block = blocks_[0];
  const int64_t last = (*row_sequence_)[static_cast<size_t>(block.first + block.count - 1)];
  for (int64_t s = (*row_sequence_)[static_cast<size_t>(block.first)]; s <= last; s++)
    for (int64_t b = 0; b < step.table_width && b * base_.block_size < step.context[s]; b++)
      ahead_blocks_.push_back(step.blocks[s * step.table_width + b]);
  ahead_pace_ = pace_ahead(block.count);
}

// A line that is under way takes one of a core's few places for them, and the matrix unit reads unpacked weights and rows
// through the same. Of more rows than have both their codes in one tile it then loses as much as is saved later, or more.
bool LayerParallel::worth_asking(int64_t rows) const {
  return !base_.layers[0].site[GATE].by_unit() || 2 * rows <= ROWS_OF_UNIT;
}

// Lines each time, so that what there is to ask for is spread over gate, up and down, which do most of it. Their walks over
// the rows share the asking for weights, and of few rows that is all that memory can give.
int64_t LayerParallel::pace_ahead(int64_t rows) const {
  int64_t lines = static_cast<int64_t>(ahead_blocks_.size()) * base_.cache_halves() / 32;
  for (const int32_t slot : ahead_slots_) lines += base_.slots[static_cast<size_t>(slot)].lines / base_.config.layers;
  lines = std::min(lines, base_.ahead_lines * static_cast<int64_t>(local_.size()));
  int64_t times = 0, weights = 0, most = 0;
  for (const int site : {GATE, UP, DOWN}) {
    const Matrix& w = base_.layers[0].site[site];
    const int64_t pieces = (w.tiles() + TILES - 1) / TILES, groups = w.padded() / GROUP;
    const int64_t each = w.by_unit() ? (groups + 1) / 2 : groups * walks_over(rows);
    times += pieces * each;
    most += pieces * (w.by_unit() ? each * MOST_OF_SPAN : groups * ((rows + ROWS - 1) / ROWS) * MOST_LINES);
    weights += pieces * groups * TILES * bytes_of_group(w.scheme) / 64;
  }
  const int64_t spare = (most - weights) / times;
  return std::max<int64_t>(0, std::min(spare, (lines + times - 1) / times));
}

// Spans of the matrix unit ask for eight lines at a time, whatever the pace.
int64_t LayerParallel::spared() const {
  return base_.layers[0].site[GATE].by_unit() ? ahead_pace_ : (ahead_pace_ + SPARED - 1) / SPARED;
}

// From now on products ask for what `layer` will read; for nothing if it is none.
void LayerParallel::look_ahead(int64_t layer) {
  look_++;
  ahead_layer_ = layer < base_.config.layers ? layer : -1;
}

// What a thread asks for beside a product; `update` is the task of this phase that it comes to next, if there is one.
Aside& LayerParallel::aside_of(int thread, int update) {
  Ahead& ahead = local_[static_cast<size_t>(thread)].ahead;
  if (ahead.look != look_) {
    ahead.look = look_;
    ahead.near = false;
    ahead.lines = ahead.far = {};
    ahead.pace = ahead_pace_;
    ahead.asked = 0;
    ahead.left = base_.ahead_lines;
  }
  if (ahead.phase == phase_ && ahead.update == update) return ahead;
  if (!ahead.near) ahead.far = ahead.lines;
  ahead.near = true;
  ahead.lines = {};
  ahead.phase = phase_;
  ahead.update = update;
  ahead.entry = ahead.end = nullptr;
  if (update == NO_UPDATE) return ahead;
  const MixRows* mix = update_tasks_[static_cast<size_t>(update)].mix;
  if (update > 0 && update_tasks_[static_cast<size_t>(update) - 1].mix == mix) return ahead;  // it has just been read
  ahead.entry = mix->entries.data();
  ahead.end = ahead.entry + mix->entries.size();
  return ahead;
}

// What the updates of this phase read of an adapter.
Lines LayerParallel::lines_of_update(int32_t slot) const {
  uint32_t which = 0;
  for (const Update& update : updated_) which |= 1u << update.at % SITES;
  const auto layer = static_cast<size_t>(updated_[0].at / SITES);
  return lines_of(base_.slots[static_cast<size_t>(slot)].sites.data() + layer * SITES, base_.layers[layer], which);
}

// Of what the next layer reads each thread has the share that it will probably read itself: the pieces of updates and
// of attention are dealt out in the same order.
void LayerParallel::refill(Ahead& ahead) const {
  if (ahead.near) {
    ahead.pace = MOST_NEAR;
    while (ahead.lines.count == 0 && ahead.entry != ahead.end) ahead.lines = lines_of_update((ahead.entry++)->slot);
    if (ahead.lines.count > 0) return;
    ahead.near = false;
    ahead.pace = ahead_pace_;
    ahead.lines = ahead.far;
  }
  if (ahead_layer_ < 0) return;
  const auto threads = static_cast<int64_t>(local_.size());
  const auto begin = [&](const std::vector<int32_t>& all) {
    return static_cast<int64_t>(all.size()) * ahead.thread / threads;
  };
  const auto count = [&](const std::vector<int32_t>& all) {
    return static_cast<int64_t>(all.size()) * (ahead.thread + 1) / threads - begin(all);
  };
  while (ahead.lines.count == 0 && ahead.left > 0) {
    const int64_t slot = ahead.asked, block = slot - count(ahead_slots_);
    if (block >= count(ahead_blocks_)) break;
    ahead.asked++;
    if (block < 0) {
      const auto at = static_cast<size_t>(ahead_slots_[static_cast<size_t>(begin(ahead_slots_) + slot)]);
      const Layer& layer = base_.layers[static_cast<size_t>(ahead_layer_)];
      ahead.lines = lines_of(base_.slots[at].sites.data() + ahead_layer_ * SITES, layer, ATTENTION_SITES);
    } else {
      const int32_t at = ahead_blocks_[static_cast<size_t>(begin(ahead_blocks_) + block)];
      const int64_t halves = base_.cache_halves();
      ahead.lines = {reinterpret_cast<const char*>(base_.cache_of(ahead_layer_).keys(at, 0)), halves / 32};
    }
    ahead.lines.count = std::min(ahead.lines.count, ahead.left);
    ahead.left -= ahead.lines.count;
  }
}

// ---- linears --------------------------------------------------------------------------------------------------

// Of few rows, by each thread when it begins with them.
void LayerParallel::fetch_once(const Activations& x, int64_t rows, int thread) {
  Local& local = local_[static_cast<size_t>(thread)];
  if (local.phase == phase_) return;
  local.phase = phase_;
  if (pool_ != nullptr && rows <= FEW) x.fetch(rows);
}

void LayerParallel::product_piece(const Matrix& w, const RowBlock& block, const Activations& x, const Target& target,
                         int64_t first, int64_t last, Aside& aside, int thread) {
  const int64_t column = first * 16, columns = std::min(last * 16, w.n) - column;
  // What is whole tiles is written in place; sums with what is there already go through the thread's own tile.
  float* y = target.add ? local_[static_cast<size_t>(thread)].tile.get() : target.out + column;
  const int64_t stride = target.add ? MOST_TILES * 16 : target.stride;
  if (block.count <= FEW)  // which comes while the products are computed
    for (int64_t r = 0; r < block.count; r++)
      for (int64_t c = 0; c < columns; c += 16) own_soon(target.out + r * target.stride + column + c);
  multiply(w, first, last, x, block.count, y, stride, aside);
  if (w.bias)
    for (int64_t r = 0; r < block.count; r++) add_row(y + r * stride, w.bias + column, columns);
  if (!target.add) return;
  for (int64_t r = 0; r < block.count; r++) add_row(target.out + r * target.stride + column, y + r * stride, columns);
}

// The base's products and the adapters' updates in turn: products live on arithmetic, and ask for what the update behind
// them reads. Whoever reads the result adds the updates. Of two threads each mostly computes those of rows that it will
// read.
void LayerParallel::products(int64_t layer, const RowBlock& block, const Activations& x, const std::vector<Target>& targets) {
  const Matrix* of = base_.layers[static_cast<size_t>(layer)].site;
  std::vector<int> sites;
  std::array<int64_t, 4> start{};
  int64_t tiles = 0;
  for (const Target& target : targets) tiles += of[target.site].tiles();
  const auto threads = static_cast<int64_t>(local_.size());
  const int64_t each = of[targets[0].site].by_unit() ? std::clamp(tiles / (3 * threads) / 2 * 2, TILES, MOST_TILES) : TILES;
  for (size_t i = 0; i < targets.size(); i++) {
    sites.push_back(targets[i].site);
    start[i + 1] = start[i] + (of[targets[i].site].tiles() + each - 1) / each;
  }
  const int updates = plan_updates(layer, block, sites);
  const int products = static_cast<int>(start[targets.size()]);
  const auto updates_before = [&](int piece) {
    return static_cast<int>(static_cast<int64_t>(piece) * updates / (updates + products));
  };
  phase_++;
  run(updates + products, [&](int piece, int thread) {
    const int update = updates_before(piece);  // how many have come before
    if (updates_before(piece + 1) > update) return update_piece(x, update, thread);
    const int product = piece - update;
    fetch_once(x, block.count, thread);
    size_t i = 0;
    while (product >= start[i + 1]) i++;
    const Matrix& w = of[targets[i].site];
    const int64_t first = (product - start[i]) * each;
    product_piece(w, block, x, targets[i], first, std::min(first + each, w.tiles()),
                  aside_of(thread, update < updates ? update : NO_UPDATE), thread);
  });
}

// Whole rows [rows, k] as the matrix unit reads them, if it does: their largest inputs have to be known.
void LayerParallel::widen(Activations& x, int64_t rows, int64_t k, const float* from) {
  if (!x.forms.wide) return;
  run(static_cast<int>((rows + ROWS - 1) / ROWS), [&](int piece, int) {
    const int64_t first = piece * ROWS;
    x.set_wide(first, std::min<int64_t>(ROWS, rows - first), k, from + first * k, k);
  });
}

// silu(gate) * up, a span of columns of each at a time, given on as quantized activations.
void LayerParallel::gate_up(int64_t layer, const RowBlock& block) {
  const Matrix& gate = base_.layers[static_cast<size_t>(layer)].site[GATE];
  const Matrix& up = base_.layers[static_cast<size_t>(layer)].site[UP];
  const int updates = plan_updates(layer, block, {GATE, UP});
  if (updates > 0)
    run(updates, [&](int piece, int thread) { update_piece(normed_, piece, thread); });
  constexpr int64_t WIDE = SPAN, EACH = WIDE / 16;
  phase_++;
  run(static_cast<int>((gate.tiles() + EACH - 1) / EACH), [&](int piece, int thread) {
    const int64_t first = piece * EACH, last = std::min(first + EACH, gate.tiles());
    const int64_t column = first * 16, columns = std::min(last * 16, gate.n) - column;
    float* y = local_[static_cast<size_t>(thread)].tile.get();
    fetch_once(normed_, block.count, thread);
    for (int side = 0; side < 2; side++) {
      const Matrix& w = side == 0 ? gate : up;
      float* to = y + side * WIDE;
      multiply(w, first, last, normed_, block.count, to, 2 * WIDE, aside_of(thread));
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
      if (gated_.forms.wide) copy_row(product_.get() + r * base_.config.intermediate + column, g, columns);
    }
    gated_.set(0, block.count, column, column + columns, y, 2 * WIDE);
  });
  widen(gated_, block.count, base_.config.intermediate, product_.get());
}

// Adds what the adapters give to the stream, where no phase that follows does.
void LayerParallel::down(int64_t layer, const RowBlock& block) {
  float* stream = stream_ + block.first * base_.config.hidden;
  products(layer, block, gated_, {{DOWN, stream, base_.config.hidden, true}});
  if (updated_.empty()) return;
  run(static_cast<int>((block.count + ROWS - 1) / ROWS), [&](int piece, int) {
    for (int64_t r = piece * ROWS; r < std::min<int64_t>(block.count, (piece + 1) * ROWS); r++)
      if (const float* z = update_of(block, DOWN, r)) add_row(stream + r * base_.config.hidden, z, base_.config.hidden);
  });
}

// The stream's rows, after the updates of `added` if that is a site, as activations `to`.
void LayerParallel::norm_rows(const RowBlock& block, const float* weight, int added, Activations& to) {
  const int pieces = static_cast<int>((block.count + ROWS - 1) / ROWS);
  const int64_t hidden = base_.config.hidden;
  run(pieces, [&](int piece, int thread) {
    const int64_t first = piece * ROWS, last = std::min<int64_t>(block.count, first + ROWS);
    float* scratch = local_[static_cast<size_t>(thread)].rows.get();
    const auto ask = [&](int64_t r) {  // other threads have added to half of it
      for (int64_t i = 0; i < hidden; i += 16)
        _mm_prefetch(reinterpret_cast<const char*>(stream_ + (block.first + r) * hidden + i), _MM_HINT_T0);
    };
    ask(first);
    for (int64_t r = first; r < last; r++) {
      if (r + 1 < last) ask(r + 1);
      float* x = stream_ + (block.first + r) * hidden;
      const float* z = added == SITES ? nullptr : update_of(block, added, r);
      if (z) add_row(x, z, hidden);
      rms_norm(x, weight, hidden, static_cast<float>(base_.config.eps), scratch + (r - first) * hidden);
    }
    to.set_rows(first, last - first, hidden, scratch, hidden);
  });
}

// ---- attention ------------------------------------------------------------------------------------------------

// A KV head of a row, with the query heads that share it: norms, positions, and the cache.
void LayerParallel::rotate_and_write(const Step& step, int64_t layer, const RowBlock& block, int64_t row, int64_t head) {
  const int64_t dim = base_.config.head_dim, group = base_.config.heads / base_.config.kv_heads;
  const int64_t heads = base_.config.heads * dim, kv = base_.config.kv_heads * dim;
  const int64_t stride = whole_tiles(heads) + 2 * whole_tiles(kv);
  const Layer& l = base_.layers[static_cast<size_t>(layer)];
  float* q = qkv_.get() + row * stride;
  float* k = q + whole_tiles(heads) + head * dim;
  float* v = q + whole_tiles(heads) + whole_tiles(kv) + head * dim;
  const int64_t position = step.positions[block.first + row];
  const float* cosine = base_.cosine + position * (dim / 2);
  const float* sine = base_.sine + position * (dim / 2);
  const auto eps = static_cast<float>(base_.config.eps);
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
  // Attention follows block by block: the row behind may not have been written by then.
  const bool last = row + 1 == block.count || block.first + row + 1 == step.row_start[s + 1];
  write_token(base_.cache_of(layer), table[position / base_.block_size], head, position % base_.block_size, k, v, last);
}

// Asks for what `rotate_and_write` will read: other threads have computed half of it.
void LayerParallel::fetch_heads(int64_t row, int64_t head) {
  const int64_t dim = base_.config.head_dim, group = base_.config.heads / base_.config.kv_heads;
  const int64_t heads = base_.config.heads * dim, kv = base_.config.kv_heads * dim;
  const float* q = qkv_.get() + row * (whole_tiles(heads) + 2 * whole_tiles(kv));
  const float* k = q + whole_tiles(heads) + head * dim;
  for (int64_t i = 0; i < group * dim; i += 16) own_soon(q + head * group * dim + i);
  for (int64_t i = 0; i < dim; i += 16) own_soon(k + i), own_soon(k + whole_tiles(kv) + i);
}

// Rows first..last of a sequence, the queries of one KV head; what they see is left in `attended_` too where
// that is a whole number of its spans.
void LayerParallel::attend_rows(const Step& step, int64_t layer, const RowBlock& block, int64_t sequence, int64_t head,
                       int64_t first, int64_t last, int thread, const uint16_t* const* following) {
  const int64_t dim = base_.config.head_dim, group = base_.config.heads / base_.config.kv_heads, heads = base_.config.heads * dim;
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
      out[n] = seen_.get() + row * heads + h * dim;
    }
    attend(base_.cache_of(layer), table, head, some, q, position, scale, local_[static_cast<size_t>(thread)].attention, out,
           following);
  }
  if (group * dim % SPAN) return;
  const int64_t from = head * group * dim;
  attended_.set(first, last - first, from, from + group * dim, seen_.get() + first * heads + from, heads);
}

void LayerParallel::attention(const Step& step, int64_t layer, const RowBlock& block) {
  struct Task {
    int32_t sequence, first, last;
  };
  thread_local std::vector<Task> tasks;
  tasks.clear();
  bool single = true;  // no row reads what another of this block writes
  const int64_t kv_heads = base_.config.kv_heads;
  // Rows of a task: eight, or as many as fill walks over the keys.
  const int64_t each = std::max<int64_t>(8, QUERIES / std::gcd<int64_t>(QUERIES, base_.config.heads / kv_heads));
  for (int64_t row = 0; row < block.count;) {
    const int32_t s = (*row_sequence_)[static_cast<size_t>(block.first + row)];
    const int64_t end = std::min<int64_t>(block.count, step.row_start[s + 1] - block.first);
    single = single && end == row + 1;
    for (; row < end; row += each)
      tasks.push_back({s, static_cast<int32_t>(row), static_cast<int32_t>(std::min<int64_t>(end, row + each))});
    row = end;
  }
  if (!single)
    run(static_cast<int>((block.count + ROWS - 1) / ROWS), [&](int piece, int) {
      for (int64_t r = piece * ROWS; r < std::min<int64_t>(block.count, (piece + 1) * ROWS); r++)
        for (int64_t head = 0; head < kv_heads; head++) rotate_and_write(step, layer, block, r, head);
    });
  const Cache cache = base_.cache_of(layer);
  const auto* all = tasks.data();
  const auto pieces = static_cast<int64_t>(tasks.size()) * kv_heads;
  run(static_cast<int>(pieces), [&](int piece, int thread) {
    const Task& task = all[piece / kv_heads];
    const int64_t head = piece % kv_heads;
    const Task& later = all[std::min<int64_t>(piece + 1, pieces - 1) / kv_heads];
    if (single) {
      rotate_and_write(step, layer, block, task.first, head);
      fetch_heads(later.first, (head + 1) % kv_heads);
    }
    const int32_t* table = step.blocks + later.sequence * step.table_width;
    const uint16_t* following[AHEAD];
    for (int64_t i = 0; i < AHEAD; i++)
      following[i] = cache.keys(table[i < step.table_width && table[i] >= 0 ? i : 0], (head + 1) % kv_heads);
    attend_rows(step, layer, block, task.sequence, head, task.first, task.last, thread, following);
  });
  const int64_t heads = base_.config.heads * base_.config.head_dim;
  widen(attended_, block.count, heads, seen_.get());
  if (base_.config.heads / base_.config.kv_heads * base_.config.head_dim % SPAN == 0) return;
  run(static_cast<int>((block.count + ROWS - 1) / ROWS), [&](int piece, int) {
    const int64_t first = piece * ROWS, some = std::min<int64_t>(ROWS, block.count - first);
    attended_.set(first, some, 0, heads, seen_.get() + first * heads, heads);
  });
}

// ---- a layer ---------------------------------------------------------------------------------------------------

void LayerParallel::run_layer(const Step& step, int64_t layer, const RowBlock& block) {
  const Layer& l = base_.layers[static_cast<size_t>(layer)];
  const int64_t heads = base_.config.heads * base_.config.head_dim, kv = base_.config.kv_heads * base_.config.head_dim;
  const int64_t stride = whole_tiles(heads) + 2 * whole_tiles(kv);
  float* stream = stream_ + block.first * base_.config.hidden;
  int64_t t = now();

  norm_rows(block, l.input_norm, SITES, entering_);
  t = clock(NORM, t);
  products(layer, block, entering_,
           {{Q, qkv_.get(), stride, false},
            {K, qkv_.get() + whole_tiles(heads), stride, false},
            {V, qkv_.get() + whole_tiles(heads) + whole_tiles(kv), stride, false}});
  t = clock(QKV, t);
  attention(step, layer, block);
  look_ahead(layer + 1);
  t = clock(ATTENTION, t);
  products(layer, block, attended_, {{O, stream, base_.config.hidden, true}});
  t = clock(OUT, t);

  norm_rows(block, l.post_norm, O, normed_);
  t = clock(NORM, t);
  gate_up(layer, block);
  t = clock(GATE_UP, t);
  down(layer, block);
  clock(DOWN_PROJ, t);
}

}  // namespace loramux
