#include "model.h"

#include <algorithm>
#include <limits>
#include <map>
#include <new>

#include "simd.h"

namespace loramux {
namespace {

// Rows of a part that one thread takes alone: with fewer it waits for weights, which all threads read then.
constexpr int64_t LEAST_ALONE = 2 * ROWS;

// Layers that threads do without waiting for each other. Whoever has something else to do goes between these.
constexpr int64_t LAYERS_APART = 3;

// What a multiplication of attention takes, in those of products: it has 16 bits, and its memory is further away.
constexpr int64_t DEARER = 4;

size_t power_of_two(int64_t n) { return static_cast<size_t>(63 - __builtin_clzll(static_cast<uint64_t>(n | 1))); }

}  // namespace

Model::Model(const Config& config, const Layer* layers, const Matrix& embed, const Matrix& head, const float* norm,
             Pool& pool)
    : base_(config, layers, pool.threads()),
      embed_(embed),
      head_(head),
      norm_(norm),
      pool_(pool),
      together_(base_, &pool),
      local_(static_cast<size_t>(pool.threads())) {
  if (pool.threads() == 1) return;
  for (size_t t = 0; t < local_.size(); t++) alone_.emplace_back(base_, nullptr);
}

void Model::set_cache(uint16_t* cache, int64_t blocks, int64_t block_size, const float* cosine, const float* sine,
                      int64_t positions) {
  base_.cache = cache;
  base_.blocks = blocks;
  base_.block_size = block_size;
  base_.cosine = cosine;
  base_.sine = sine;
  base_.positions = positions;
  touched_ = 0;
}

int64_t Model::work_bytes() const {
  int64_t bytes = stream_.bytes() + normed_.bytes() + together_.bytes();
  for (const LayerParallel& team : alone_) bytes += team.bytes();
  for (const Local& local : local_) bytes += local.tile.bytes() + local.rows.bytes() + local.draw.bytes();
  return bytes;
}

// Threads that work alone do so at the same time: their mean.
void Model::take_times(int64_t* out) {
  for (size_t i = 0; i < PHASES; i++) {
    int64_t alone = 0;
    for (const LayerParallel& team : alone_) alone += team.times()[i];
    const auto threads = static_cast<int64_t>(local_.size());
    out[i] = times_[i] + together_.times()[i] + alone / threads;
  }
  times_.fill(0);
  together_.forget_times();
  for (LayerParallel& team : alone_) team.forget_times();
}

int64_t Model::clock(Phase phase, int64_t since) {
  const int64_t t = now();
  times_[phase] += t - since;
  return t;
}

// Everything that a step points into is there: what it names wrongly would be read or written beyond it.
Outcome Model::check(const Step& step) const {
  if (base_.cache == nullptr) return NO_CACHE;
  const auto within = [](int64_t i, int64_t end) { return i >= 0 && i < end; };
  if (step.row_start[0] != 0 || step.row_start[step.sequences] != step.rows) return BAD_ROW;
  for (int64_t r = 0; r < step.rows; r++)
    if (!within(step.tokens[r], base_.config.vocab)) return BAD_TOKEN;
  for (int64_t s = 0; s < step.sequences; s++) {
    if (step.row_start[s] > step.row_start[s + 1] || step.row_start[s + 1] > step.rows) return BAD_ROW;
    for (int64_t r = step.row_start[s]; r < step.row_start[s + 1]; r++)
      if (!within(step.positions[r], std::min<int64_t>(base_.positions, step.context[s]))) return BAD_POSITION;
    if (step.context[s] > step.table_width * base_.block_size) return BAD_POSITION;
    for (int64_t b = 0; b * base_.block_size < step.context[s]; b++)
      if (!within(step.blocks[s * step.table_width + b], base_.blocks)) return BAD_BLOCK;
    for (int32_t i = step.mix_start[s]; i < step.mix_start[s + 1]; i++)
      if (!within(step.mix_slot[i], base_.config.max_slots) ||
          base_.slots[static_cast<size_t>(step.mix_slot[i])].sites.empty())
        return EMPTY_SLOT;
  }
  for (int64_t i = 0; i < step.logit_count; i++)
    if (!within(step.logit_rows[i], step.rows)) return BAD_ROW;
  return DONE;
}

// ---- the adapters of a step -----------------------------------------------------------------------------------

LoraPlan Model::plan_block(const Step& step, int64_t first, int64_t count) const {
  LoraPlan plan;
  plan.mixed.assign(static_cast<size_t>(count), 0);
  std::map<std::vector<std::pair<int32_t, float>>, size_t> mix_at;
  int64_t row = first;
  while (row < first + count) {
    const int32_t s = row_sequence_[static_cast<size_t>(row)];
    const int64_t end = std::min<int64_t>(first + count, step.row_start[s + 1]);
    std::vector<std::pair<int32_t, float>> mix;
    for (int32_t i = step.mix_start[s]; i < step.mix_start[s + 1]; i++)
      mix.emplace_back(step.mix_slot[i], step.mix_weight[i]);
    if (!mix.empty()) {
      const auto [at, fresh] = mix_at.emplace(mix, plan.mixes.size());
      if (fresh) {
        MixRows& group = plan.mixes.emplace_back();
        for (const auto& [slot, weight] : mix) {
          group.entries.push_back({slot, weight});
          const Slot& adapter = base_.slots[static_cast<size_t>(slot)];
          plan.sites |= adapter.uses;
          plan.rank = std::max(plan.rank, adapter.rank);
        }
      }
      for (int64_t r = row; r < end; r++) {
        plan.mixes[at->second].rows.push_back(static_cast<int32_t>(r - first));
        plan.mixed[static_cast<size_t>(r - first)] = 1;
      }
    }
    row = end;
  }
  return plan;
}

std::vector<RowBlock> Model::blocks_of(const Step& step, int64_t first, int64_t last) const {
  std::vector<RowBlock> blocks;
  for (int64_t r = first; r < last; r += BLOCK) {
    const int64_t count = std::min(BLOCK, last - r);
    blocks.push_back({r, count, plan_block(step, r, count)});
  }
  return blocks;
}

// What the sequences before each take, and the last what all do, in multiplications of products.
std::vector<int64_t> Model::costs_of(const Step& step) const {
  int64_t products = 0;
  for (const Matrix& w : base_.layers[0].site) products += w.n * w.k;
  const int64_t token = DEARER * 2 * base_.config.heads * base_.config.head_dim;
  std::vector<int64_t> costs{0};
  for (int64_t s = 0; s < step.sequences; s++)
    costs.push_back(costs.back() +
                    (step.row_start[s + 1] - step.row_start[s]) * (products + token * step.context[s]));
  return costs;
}

// Where the last of the rows is that each thread takes alone. None where sequences do not fall into parts that are large
// enough and take about as long as each other.
std::vector<int64_t> Model::parts_of(const Step& step, const std::vector<int64_t>& cost) const {
  const auto parts = static_cast<int64_t>(alone_.size());
  if (parts == 0 || step.rows < parts * LEAST_ALONE || step.rows > BLOCK) return {};
  std::vector<int64_t> ends;
  int64_t begin = 0, most = 0;
  for (int64_t part = 1, s = 0; part <= parts; part++) {
    const int64_t aim = cost.back() / parts * part, from = cost[static_cast<size_t>(s)];
    const auto cost_until = [&](int64_t end) { return cost[static_cast<size_t>(end)]; };
    while (s < step.sequences && (part == parts || cost_until(s + 1) - aim <= aim - cost_until(s))) s++;
    if (step.row_start[s] - begin < LEAST_ALONE) return {};
    most = std::max(most, cost_until(s) - from);
    ends.push_back(begin = step.row_start[s]);
  }
  return most * parts <= cost.back() / 8 * 9 ? ends : std::vector<int64_t>();
}

// The teams of the step, of one thread each for the rows up to each of `ends`, or one of all threads.
std::vector<LayerParallel*> Model::deal(const Step& step, const std::vector<int64_t>& ends) {
  row_sequence_.resize(static_cast<size_t>(step.rows));
  for (int64_t s = 0; s < step.sequences; s++)
    for (int64_t r = step.row_start[s]; r < step.row_start[s + 1]; r++)
      row_sequence_[static_cast<size_t>(r)] = static_cast<int32_t>(s);
  float* stream = stream_.reserve(step.rows * base_.config.hidden);
  std::vector<LayerParallel*> teams;
  int64_t first = 0;
  for (const int64_t last : ends) {
    teams.push_back(&alone_[teams.size()]);
    teams.back()->begin(step, row_sequence_, blocks_of(step, first, last), stream);
    first = last;
  }
  if (!teams.empty()) return teams;
  together_.begin(step, row_sequence_, blocks_of(step, 0, step.rows), stream);
  return {&together_};
}

void Model::head(const Step& step) {
  constexpr int64_t EACH = 8;  // tiles: the table is long
  const int64_t tiles = head_.tiles(), pieces = (tiles + EACH - 1) / EACH;
  for (int64_t first = 0; first < step.logit_count; first += BLOCK) {
    const int64_t count = std::min(BLOCK, step.logit_count - first);
    normed_.reserve(count, base_.config.hidden, forms_of(head_));
    for (Local& local : local_) {
      local.tile.reserve(count * EACH * 16);
      local.rows.reserve(ROWS * base_.config.hidden);
      local.peaks.assign(static_cast<size_t>(count), Peaks());
    }
    pool_.run(static_cast<int>((count + ROWS - 1) / ROWS), [&](int piece, int thread) {
      const int64_t begin = piece * ROWS, end = std::min<int64_t>(count, begin + ROWS);
      float* scratch = local_[static_cast<size_t>(thread)].rows.get();
      for (int64_t r = begin; r < end; r++)
        rms_norm(stream_.get() + step.logit_rows[first + r] * base_.config.hidden, norm_, base_.config.hidden,
                 static_cast<float>(base_.config.eps), scratch + (r - begin) * base_.config.hidden);
      normed_.set_rows(begin, end - begin, base_.config.hidden, scratch, base_.config.hidden);
    });
    pool_.run(static_cast<int>(pieces), [&](int piece, int thread) {
      Aside nothing;
      const int64_t tile = piece * EACH, last = std::min(tile + EACH, tiles);
      const int64_t columns = std::min(last * 16, base_.config.vocab) - tile * 16;
      float* to = step.logits + first * base_.config.vocab + tile * 16;
      if (last * 16 <= base_.config.vocab) {
        multiply(head_, tile, last, normed_, count, to, base_.config.vocab, nothing);
      } else {
        float* y = local_[static_cast<size_t>(thread)].tile.get();
        multiply(head_, tile, last, normed_, count, y, EACH * 16, nothing);
        for (int64_t r = 0; r < count; r++) copy_row(to + r * base_.config.vocab, y + r * EACH * 16, columns);
      }
      auto& peaks = local_[static_cast<size_t>(thread)].peaks;
      for (int64_t r = 0; r < count; r++)  // while they are still in the first cache
        peaks[static_cast<size_t>(r)].take(to + r * base_.config.vocab, columns, tile * 16);
    });
    for (int64_t r = 0; r < count; r++) {
      Peaks all;
      for (const Local& local : local_) all.take(local.peaks[static_cast<size_t>(r)]);
      step.largest[first + r] = all.first_largest();
    }
  }
}

Outcome Model::run(const Step& step) {
  std::lock_guard<std::mutex> turn(pool_.turn);
  int64_t t = now();
  if (const Outcome wrong = check(step); wrong != DONE) return wrong;
  int64_t touched = touched_.load();
  for (int64_t s = 0; s < step.sequences; s++)
    for (int64_t b = 0; b * base_.block_size < step.context[s]; b++)
      touched = std::max<int64_t>(touched, step.blocks[s * step.table_width + b] + 1);
  touched_.store(touched);
  const std::vector<int64_t> costs = costs_of(step);
  std::vector<int64_t> ends = parts_of(step, costs);
  Autotuner* apart = ends.empty() ? nullptr : &apart_[static_cast<size_t>((step.rows - 1) / APART)];
  if (apart != nullptr && apart->way() == 1) ends.clear();
  steps_apart_ += !ends.empty();
  const std::vector<LayerParallel*> teams = deal(step, ends);
  // Found after the other: of ways that took turns in step, neither would be measured by itself.
  Autotuner* sparing = nullptr;
  if (teams[0]->can_spare() && (apart == nullptr || apart->known()))
    sparing = &sparing_[std::min(PACES - 1, power_of_two(teams[0]->ahead_pace()))][power_of_two(step.rows)];
  if (sparing != nullptr && sparing->way() == 1) {
    for (LayerParallel* team : teams) team->spare();
    steps_sparing_++;
  }
  pool_.run(static_cast<int>((step.rows + ROWS - 1) / ROWS), [&](int piece, int) {
    for (int64_t r = piece * ROWS; r < std::min<int64_t>(step.rows, (piece + 1) * ROWS); r++)
      dequantize_row(embed_, step.tokens[r], stream_.get() + r * base_.config.hidden);
  });
  clock(PLAN, t);
  layers_began_.store(now());
  struct Over {  // however it ends
    std::atomic<int64_t>& layers_done;
    ~Over() { layers_done.store(0); }
  } over{layers_done_};
  const int64_t some = teams.size() > 1 ? LAYERS_APART : 1;
  std::atomic<bool> no_memory{false};  // no exception leaves a phase
  for (int64_t layer = 0; layer < base_.config.layers;) {
    const int64_t end = std::min(base_.config.layers, layer + some);
    pool_.run(static_cast<int>(teams.size()), [&](int team, int) {  // no phase if there is one team only
      try {
        for (int64_t l = layer; l < end; l++) teams[static_cast<size_t>(team)]->layer(step, l);
      } catch (const std::bad_alloc&) {
        no_memory.store(true);
      }
    });
    if (no_memory.load()) throw std::bad_alloc();
    layer = end;
    layers_done_.store(layer);
    pool_.wake_parked();  // a pool of one thread has no phases that would
  }
  t = now();
  const double took = static_cast<double>(t - layers_began_.load()) / static_cast<double>(std::max<int64_t>(1, costs.back()));
  for (Autotuner* way : {apart, sparing})
    if (way != nullptr) way->took(took);
  head(step);
  if (step.logit_count > 0) head_took_.store(clock(HEAD, t) - t);
  return DONE;
}

int64_t Model::left() const {
  const int64_t done = layers_done_.load();
  if (done == 0) return std::numeric_limits<int64_t>::max();
  if (done == base_.config.layers) return 0;  // nobody looks within the head, however long that takes
  return (now() - layers_began_.load()) * (base_.config.layers - done) / done + head_took_.load();
}

void Model::draw(const float* logits, int64_t rows, const Drawing* how, const int32_t* top_k, int32_t* tokens) {
  std::lock_guard<std::mutex> turn(pool_.turn);
  const int64_t t = now();
  for (Local& local : local_) local.draw.reserve(base_.config.vocab);
  pool_.run(static_cast<int>(rows), [&](int row, int thread) {
    tokens[row] = loramux::draw(logits + row * base_.config.vocab, base_.config.vocab, how[row], top_k[row],
                                local_[static_cast<size_t>(thread)].draw);
  });
  clock(DRAW, t);
}

}  // namespace loramux
