#include "model.h"

#include <algorithm>
#include <limits>
#include <map>
#include <new>

#include "simd.h"

namespace loramux {
namespace {

// Least rows per thread for row-parallel steps. With fewer, threads wait for weights.
constexpr int64_t MIN_ROWS_PER_THREAD = 2 * ROWS;

// Layers that row-parallel threads run between barriers. Other processes get the CPU there.
constexpr int64_t LAYERS_PER_BARRIER = 3;

// Cost of a multiplication in attention relative to one in a GEMM.
constexpr int64_t ATTENTION_COST = 4;

size_t log2_floor(int64_t n) { return static_cast<size_t>(63 - __builtin_clzll(static_cast<uint64_t>(n | 1))); }

}  // namespace

Model::Model(const Config& config, const Layer* layers, const Matrix& embed, const Matrix& head, const float* norm,
             ThreadPool& pool)
    : data_(config, layers, pool.threads()),
      embed_(embed),
      head_(head),
      norm_(norm),
      pool_(pool),
      parallel_(data_, &pool),
      local_(static_cast<size_t>(pool.threads())) {
  if (pool.threads() == 1) return;
  for (size_t t = 0; t < local_.size(); t++) single_.emplace_back(data_, nullptr);
}

void Model::set_cache(uint16_t* cache, int64_t blocks, int64_t block_size, const float* cosine, const float* sine,
                      int64_t positions) {
  data_.cache = cache;
  data_.blocks = blocks;
  data_.block_size = block_size;
  data_.cosine = cosine;
  data_.sine = sine;
  data_.positions = positions;
  used_blocks_ = 0;
}

int64_t Model::work_bytes() const {
  int64_t bytes = stream_.bytes() + head_in_.bytes() + parallel_.bytes();
  for (const LayerRunner& runner : single_) bytes += runner.bytes();
  for (const Local& local : local_) bytes += local.tile.bytes() + local.rows.bytes() + local.sample.bytes();
  return bytes;
}

// Threads that run their own rows run at the same time, so their times are averaged.
void Model::take_times(int64_t* out) {
  for (size_t i = 0; i < PHASES; i++) {
    int64_t alone = 0;
    for (const LayerRunner& runner : single_) alone += runner.times()[i];
    const auto threads = static_cast<int64_t>(local_.size());
    out[i] = times_[i] + parallel_.times()[i] + alone / threads;
  }
  times_.fill(0);
  parallel_.reset_times();
  for (LayerRunner& runner : single_) runner.reset_times();
}

int64_t Model::clock(Phase phase, int64_t since) {
  const int64_t t = now();
  times_[phase] += t - since;
  return t;
}

// Validates everything in a step that is used as an index.
Outcome Model::check(const Step& step) const {
  if (data_.cache == nullptr) return NO_CACHE;
  const auto within = [](int64_t i, int64_t end) { return i >= 0 && i < end; };
  if (step.row_start[0] != 0 || step.row_start[step.sequences] != step.rows) return BAD_ROW;
  for (int64_t r = 0; r < step.rows; r++)
    if (!within(step.tokens[r], data_.config.vocab)) return BAD_TOKEN;
  for (int64_t s = 0; s < step.sequences; s++) {
    if (step.row_start[s] > step.row_start[s + 1] || step.row_start[s + 1] > step.rows) return BAD_ROW;
    for (int64_t r = step.row_start[s]; r < step.row_start[s + 1]; r++)
      if (!within(step.positions[r], std::min<int64_t>(data_.positions, step.context[s]))) return BAD_POSITION;
    if (step.context[s] > step.table_width * data_.block_size) return BAD_POSITION;
    for (int64_t b = 0; b * data_.block_size < step.context[s]; b++)
      if (!within(step.blocks[s * step.table_width + b], data_.blocks)) return BAD_BLOCK;
    for (int32_t i = step.mix_start[s]; i < step.mix_start[s + 1]; i++)
      if (!within(step.mix_slot[i], data_.config.max_slots) ||
          data_.slots[static_cast<size_t>(step.mix_slot[i])].modules.empty())
        return EMPTY_SLOT;
  }
  for (int64_t i = 0; i < step.logit_count; i++)
    if (!within(step.logit_rows[i], step.rows)) return BAD_ROW;
  return DONE;
}

// ---- adapters of a step ------------------------------------------------------------------

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
          const Slot& adapter = data_.slots[static_cast<size_t>(slot)];
          plan.modules |= adapter.uses;
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

// Cumulative cost of the sequences, in GEMM multiplications.
std::vector<int64_t> Model::sequence_costs(const Step& step) const {
  int64_t products = 0;
  for (const Matrix& w : data_.layers[0].module) products += w.n * w.k;
  const int64_t token = ATTENTION_COST * 2 * data_.config.heads * data_.config.head_dim;
  std::vector<int64_t> costs{0};
  for (int64_t s = 0; s < step.sequences; s++)
    costs.push_back(costs.back() + (step.row_start[s + 1] - step.row_start[s]) * (products + token * step.context[s]));
  return costs;
}

// Splits whole sequences among the threads: the end row of each thread. Empty if the parts would be too small or too
// uneven.
std::vector<int64_t> Model::split_rows(const Step& step, const std::vector<int64_t>& cost) const {
  const auto parts = static_cast<int64_t>(single_.size());
  if (parts == 0 || step.rows < parts * MIN_ROWS_PER_THREAD || step.rows > BLOCK) return {};
  std::vector<int64_t> ends;
  int64_t begin = 0, most = 0;
  for (int64_t part = 1, s = 0; part <= parts; part++) {
    const int64_t aim = cost.back() / parts * part, from = cost[static_cast<size_t>(s)];
    const auto cost_until = [&](int64_t end) { return cost[static_cast<size_t>(end)]; };
    while (s < step.sequences && (part == parts || cost_until(s + 1) - aim <= aim - cost_until(s))) s++;
    if (step.row_start[s] - begin < MIN_ROWS_PER_THREAD) return {};
    most = std::max(most, cost_until(s) - from);
    ends.push_back(begin = step.row_start[s]);
  }
  return most * parts <= cost.back() / 8 * 9 ? ends : std::vector<int64_t>();
}

// Assigns rows to runners: one single-threaded runner per part, or one with all threads.
std::vector<LayerRunner*> Model::assign_rows(const Step& step, const std::vector<int64_t>& ends) {
  row_sequence_.resize(static_cast<size_t>(step.rows));
  for (int64_t s = 0; s < step.sequences; s++)
    for (int64_t r = step.row_start[s]; r < step.row_start[s + 1]; r++)
      row_sequence_[static_cast<size_t>(r)] = static_cast<int32_t>(s);
  float* stream = stream_.reserve(step.rows * data_.config.hidden);
  std::vector<LayerRunner*> runners;
  int64_t first = 0;
  for (const int64_t last : ends) {
    runners.push_back(&single_[runners.size()]);
    runners.back()->begin(step, row_sequence_, blocks_of(step, first, last), stream);
    first = last;
  }
  if (!runners.empty()) return runners;
  parallel_.begin(step, row_sequence_, blocks_of(step, 0, step.rows), stream);
  return {&parallel_};
}

void Model::head(const Step& step) {
  constexpr int64_t FORCE_INLINE = 8;  // tiles
  const int64_t tiles = head_.tiles(), chunks = (tiles + FORCE_INLINE - 1) / FORCE_INLINE;
  for (int64_t first = 0; first < step.logit_count; first += BLOCK) {
    const int64_t count = std::min(BLOCK, step.logit_count - first);
    head_in_.reserve(count, data_.config.hidden, formats_of(head_));
    for (Local& local : local_) {
      local.tile.reserve(count * FORCE_INLINE * 16);
      local.rows.reserve(ROWS * data_.config.hidden);
      local.maxima.assign(static_cast<size_t>(count), RowMax());
    }
    pool_.run(static_cast<int>((count + ROWS - 1) / ROWS), [&](int chunk, int thread) {
      const int64_t begin = chunk * ROWS, end = std::min<int64_t>(count, begin + ROWS);
      float* scratch = local_[static_cast<size_t>(thread)].rows.get();
      for (int64_t r = begin; r < end; r++)
        rms_norm(stream_.get() + step.logit_rows[first + r] * data_.config.hidden, norm_, data_.config.hidden,
                 static_cast<float>(data_.config.eps), scratch + (r - begin) * data_.config.hidden);
      head_in_.set_rows(begin, end - begin, data_.config.hidden, scratch, data_.config.hidden);
    });
    pool_.run(static_cast<int>(chunks), [&](int chunk, int thread) {
      Prefetcher no_prefetch;
      const int64_t tile = chunk * FORCE_INLINE, last = std::min(tile + FORCE_INLINE, tiles);
      const int64_t columns = std::min(last * 16, data_.config.vocab) - tile * 16;
      float* to = step.logits + first * data_.config.vocab + tile * 16;
      if (last * 16 <= data_.config.vocab) {
        multiply(head_, tile, last, head_in_, count, to, data_.config.vocab, no_prefetch);
      } else {
        float* y = local_[static_cast<size_t>(thread)].tile.get();
        multiply(head_, tile, last, head_in_, count, y, FORCE_INLINE * 16, no_prefetch);
        for (int64_t r = 0; r < count; r++) copy_row(to + r * data_.config.vocab, y + r * FORCE_INLINE * 16, columns);
      }
      auto& maxima = local_[static_cast<size_t>(thread)].maxima;
      for (int64_t r = 0; r < count; r++)  // while they are in the L1 cache
        maxima[static_cast<size_t>(r)].update(to + r * data_.config.vocab, columns, tile * 16);
    });
    for (int64_t r = 0; r < count; r++) {
      RowMax all;
      for (const Local& local : local_) all.update(local.maxima[static_cast<size_t>(r)]);
      step.argmax[first + r] = all.argmax();
    }
  }
}

Outcome Model::run(const Step& step) {
  std::lock_guard<std::mutex> lock(pool_.mutex);
  int64_t t = now();
  if (const Outcome wrong = check(step); wrong != DONE) return wrong;
  int64_t used_blocks = used_blocks_.load();
  for (int64_t s = 0; s < step.sequences; s++)
    for (int64_t b = 0; b * data_.block_size < step.context[s]; b++)
      used_blocks = std::max<int64_t>(used_blocks, step.blocks[s * step.table_width + b] + 1);
  used_blocks_.store(used_blocks);
  const std::vector<int64_t> costs = sequence_costs(step);
  std::vector<int64_t> ends = split_rows(step, costs);
  Autotuner* split_tuner = ends.empty() ? nullptr : &split_tuner_[static_cast<size_t>((step.rows - 1) / ROW_BUCKET)];
  if (split_tuner != nullptr && split_tuner->choice() == 1) ends.clear();
  row_parallel_steps_ += !ends.empty();
  const std::vector<LayerRunner*> runners = assign_rows(step, ends);
  // Tuned after the other choice, so that each is measured alone.
  Autotuner* rate_tuner = nullptr;
  if (runners[0]->can_reduce_rate() && (split_tuner == nullptr || split_tuner->settled()))
    rate_tuner = &rate_tuner_[std::min(RATES - 1, log2_floor(runners[0]->prefetch_rate()))][log2_floor(step.rows)];
  if (rate_tuner != nullptr && rate_tuner->choice() == 1) {
    for (LayerRunner* runner : runners) runner->reduce_rate();
    reduced_prefetch_steps_++;
  }
  pool_.run(static_cast<int>((step.rows + ROWS - 1) / ROWS), [&](int chunk, int) {
    for (int64_t r = chunk * ROWS; r < std::min<int64_t>(step.rows, (chunk + 1) * ROWS); r++)
      dequantize_row(embed_, step.tokens[r], stream_.get() + r * data_.config.hidden);
  });
  clock(PLAN, t);
  layers_start_.store(now());
  struct Finish {  // on any exit
    std::atomic<int64_t>& layers_done;
    ~Finish() { layers_done.store(0); }
  } finish{layers_done_};
  const int64_t count = runners.size() > 1 ? LAYERS_PER_BARRIER : 1;
  std::atomic<bool> no_memory{false};  // no exception may leave a chunk
  for (int64_t layer = 0; layer < data_.config.layers;) {
    const int64_t end = std::min(data_.config.layers, layer + count);
    pool_.run(static_cast<int>(runners.size()),
              [&](int runner, int) {  // a single runner runs on this thread and uses the pool itself
                try {
                  for (int64_t l = layer; l < end; l++) runners[static_cast<size_t>(runner)]->layer(step, l);
                } catch (const std::bad_alloc&) {
                  no_memory.store(true);
                }
              });
    if (no_memory.load()) throw std::bad_alloc();
    layer = end;
    layers_done_.store(layer);
    pool_.wake_parked();  // a pool of one thread never wakes others in `run`
  }
  t = now();
  const double time =
      static_cast<double>(t - layers_start_.load()) / static_cast<double>(std::max<int64_t>(1, costs.back()));
  for (Autotuner* tuner : {split_tuner, rate_tuner})
    if (tuner != nullptr) tuner->record(time);
  head(step);
  if (step.logit_count > 0) head_time_.store(clock(HEAD, t) - t);
  return DONE;
}

int64_t Model::remaining_ns() const {
  const int64_t done = layers_done_.load();
  if (done == 0) return std::numeric_limits<int64_t>::max();
  if (done == data_.config.layers) return 0;  // the head is not waited for
  return (now() - layers_start_.load()) * (data_.config.layers - done) / done + head_time_.load();
}

void Model::sample(const float* logits, int64_t rows, const SamplingParams* params, const int32_t* top_k,
                   int32_t* tokens) {
  std::lock_guard<std::mutex> lock(pool_.mutex);
  const int64_t t = now();
  for (Local& local : local_) local.sample.reserve(data_.config.vocab);
  pool_.run(static_cast<int>(rows), [&](int row, int thread) {
    tokens[row] = loramux::sample(logits + row * data_.config.vocab, data_.config.vocab, params[row], top_k[row],
                                  local_[static_cast<size_t>(thread)].sample);
  });
  clock(DRAW, t);
}

}  // namespace loramux
