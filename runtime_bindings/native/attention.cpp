// Online softmax over blocks of keys (Milakov and Gimelshein 2018, arXiv 1805.02867; Dao et al. 2022, arXiv
// 2205.14135): each row keeps the highest score so far, the sum of exponentials relative to it, and the weighted sum of
// values. The query heads that share a KV head are rows of one matrix, so that a key is read once for all of them.
//
// Written in the compiler's vectors of W floats, without intrinsics, and compiled once for each instruction set: what
// takes W is inlined into the function that has the target attribute.
#include "attention.h"

#include <executorch/runtime/kernel/thread_parallel_interface.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#define INLINE inline __attribute__((always_inline))

namespace pocketlm {
namespace {

constexpr int64_t kBlock = 64;            // keys that are scored at a time
constexpr int64_t kRowsToTranspose = 16;  // from so many rows on, a transposed block of keys pays
constexpr int64_t kRowsOfTask = 128;      // aimed at: more would leave the cache, fewer read the keys more often
constexpr float kHidden = -std::numeric_limits<float>::infinity();

template <int W>
struct Lanes {
  typedef float Floats __attribute__((vector_size(W * 4), aligned(4)));
  typedef int32_t Integers __attribute__((vector_size(W * 4), aligned(4)));
};
template <int W>
using Floats = typename Lanes<W>::Floats;

template <int W>
INLINE Floats<W> load(const float* from) {
  Floats<W> vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}

template <class Vector>
INLINE void store(float* to, Vector vector) {
  std::memcpy(to, &vector, sizeof vector);
}

template <int W>
INLINE float sum_of(Floats<W> vector) {
  if constexpr (W == 1) {
    return vector[0];
  } else {
    float lanes[W];
    store(lanes, vector);
    return sum_of<W / 2>(load<W / 2>(lanes) + load<W / 2>(lanes + W / 2));
  }
}

// e^x for x <= 0, to 2 units in the last place; 0 below -87, where float32 ends.
template <int W>
INLINE Floats<W> exponential(Floats<W> x) {
  using Integers = typename Lanes<W>::Integers;
  constexpr float kLowest = -87.0f, kLog2E = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  const Floats<W> clamped = x < kLowest ? Floats<W>{} + kLowest : x;
  const Integers power = __builtin_convertvector(clamped * kLog2E - 0.5f, Integers);  // rounded to the nearest
  const Floats<W> n = __builtin_convertvector(power, Floats<W>);
  const Floats<W> rest = clamped - n * kLn2High - n * kLn2Low;  // ln 2 in two parts: n times the first is exact
  Floats<W> series = rest * (1.0f / 5040) + 1.0f / 720;
  series = series * rest + 1.0f / 120;
  series = series * rest + 1.0f / 24;
  series = series * rest + 1.0f / 6;
  series = series * rest + 0.5f;
  series = series * rest + 1.0f;
  series = series * rest + 1.0f;
  const Floats<W> scaled = series * reinterpret_cast<Floats<W>>((power + 127) << 23);
  return x < kLowest ? Floats<W>{} : scaled;
}

// c[Rows, Vectors * W] = a[Rows, depth] b[depth, Vectors * W], added to c if kAdd; strides are between rows.
template <int W, int Rows, int Vectors, bool kAdd>
INLINE void multiply_tile(const float* a, int64_t a_stride, const float* b, int64_t b_stride, float* c,
                          int64_t c_stride, int64_t depth) {
  Floats<W> sums[Rows][Vectors] = {};
  if constexpr (kAdd) {
    for (int i = 0; i < Rows; i++)
      for (int j = 0; j < Vectors; j++) sums[i][j] = load<W>(c + i * c_stride + j * W);
  }
  for (int64_t k = 0; k < depth; k++) {
    for (int j = 0; j < Vectors; j++) {
      const Floats<W> factor = load<W>(b + k * b_stride + j * W);
      for (int i = 0; i < Rows; i++) sums[i][j] += a[i * a_stride + k] * factor;
    }
  }
  for (int i = 0; i < Rows; i++)
    for (int j = 0; j < Vectors; j++) store(c + i * c_stride + j * W, sums[i][j]);
}

template <int W, int Rows, bool kAdd>
INLINE void multiply_rows(const float* a, int64_t a_stride, const float* b, int64_t b_stride, float* c,
                          int64_t c_stride, int64_t columns, int64_t depth) {
  int64_t j = 0;
  for (; j + 2 * W <= columns; j += 2 * W)
    multiply_tile<W, Rows, 2, kAdd>(a, a_stride, b + j, b_stride, c + j, c_stride, depth);
  for (; j + W <= columns; j += W)
    multiply_tile<W, Rows, 1, kAdd>(a, a_stride, b + j, b_stride, c + j, c_stride, depth);
  for (; j < columns; j++) multiply_tile<1, Rows, 1, kAdd>(a, a_stride, b + j, b_stride, c + j, c_stride, depth);
}

template <int W, bool kAdd>
INLINE void multiply(const float* a, int64_t a_stride, const float* b, int64_t b_stride, float* c, int64_t c_stride,
                     int64_t rows, int64_t columns, int64_t depth) {
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4)
    multiply_rows<W, 4, kAdd>(a + i * a_stride, a_stride, b, b_stride, c + i * c_stride, c_stride, columns, depth);
  for (; i < rows; i++)
    multiply_rows<W, 1, kAdd>(a + i * a_stride, a_stride, b, b_stride, c + i * c_stride, c_stride, columns, depth);
}

// Scores of Rows rows against one key.
template <int W, int Rows>
INLINE void score(const float* rows, const float* key, float* scores, int64_t head_dim) {
  Floats<W> sums[Rows] = {};
  int64_t x = 0;
  for (; x + W <= head_dim; x += W) {
    const Floats<W> part = load<W>(key + x);
    for (int i = 0; i < Rows; i++) sums[i] += load<W>(rows + i * head_dim + x) * part;
  }
  for (int i = 0; i < Rows; i++) {
    float total = sum_of<W>(sums[i]);
    for (int64_t y = x; y < head_dim; y++) total += rows[i * head_dim + y] * key[y];
    scores[i * kBlock] = total;
  }
}

// What one thread does at a time: the queries [first, last) of some heads that share a KV head. Row r is query
// first + r / heads of head r % heads.
struct Task {
  const Attention* call;
  const float *query, *key, *value;  // of the first of the heads
  float* output;
  int64_t heads, first, last;

  int64_t rows() const { return (last - first) * heads; }
  int64_t offset(int64_t row) const {
    return (first + row / heads) * call->query_heads * call->head_dim + row % heads * call->head_dim;
  }
};

// The memory of a task, one row after another.
struct Scratch {
  float *query, *sums, *scores, *keys, *highest, *totals;

  static int64_t size(int64_t rows, int64_t head_dim) { return rows * (2 * head_dim + kBlock + 2) + kBlock * head_dim; }
  Scratch(float* memory, int64_t rows, int64_t head_dim)
      : query(memory),
        sums(query + rows * head_dim),
        scores(sums + rows * head_dim),
        keys(scores + rows * kBlock),
        highest(keys + kBlock * head_dim),
        totals(highest + rows) {}
};

template <int W>
INLINE void score_block(const Task& task, const Scratch& at, const float* keys, int64_t count) {
  const int64_t rows = task.rows(), head_dim = task.call->head_dim, stride = task.call->kv_heads * head_dim;
  if (rows >= kRowsToTranspose) {
    for (int64_t n = 0; n < count; n++)
      for (int64_t x = 0; x < head_dim; x++) at.keys[x * kBlock + n] = keys[n * stride + x];
    multiply<W, false>(at.query, head_dim, at.keys, kBlock, at.scores, kBlock, rows, count, head_dim);
    return;
  }
  for (int64_t n = 0; n < count; n++) {
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4)
      score<W, 4>(at.query + r * head_dim, keys + n * stride, at.scores + r * kBlock + n, head_dim);
    for (; r < rows; r++) score<W, 1>(at.query + r * head_dim, keys + n * stride, at.scores + r * kBlock + n, head_dim);
  }
}

// Adds the mask, hides what is not to be seen and what lies behind the block's end.
INLINE void mask_block(const Task& task, const Scratch& at, int64_t begin, int64_t count) {
  const Attention& call = *task.call;
  for (int64_t r = 0; r < task.rows(); r++) {
    float* scores = at.scores + r * kBlock;
    const int64_t query = task.first + r / task.heads;
    if (call.mask != nullptr)
      for (int64_t n = 0; n < count; n++) scores[n] += call.mask[query * call.keys + begin + n];
    const int64_t seen = call.causal ? std::clamp<int64_t>(call.start + query + 1 - begin, 0, count) : count;
    std::fill(scores + seen, scores + kBlock, kHidden);
  }
}

// Scores become exponentials relative to the row's highest score; what was summed relative to a lower one is rescaled.
template <int W>
INLINE void exponentiate_block(const Scratch& at, int64_t rows, int64_t head_dim) {
  for (int64_t r = 0; r < rows; r++) {
    float* scores = at.scores + r * kBlock;
    Floats<W> highest_lanes = load<W>(scores);
    for (int64_t n = W; n < kBlock; n += W) {
      const Floats<W> lanes = load<W>(scores + n);
      highest_lanes = lanes > highest_lanes ? lanes : highest_lanes;
    }
    float highest = at.highest[r];
    for (int i = 0; i < W; i++) highest = std::max(highest, static_cast<float>(highest_lanes[i]));
    if (highest == kHidden) {  // nothing seen so far, and inf - inf is no number
      std::fill(scores, scores + kBlock, 0.0f);
      continue;
    }
    Floats<W> total = {};
    for (int64_t n = 0; n < kBlock; n += W) {
      const Floats<W> weights = exponential<W>(load<W>(scores + n) - highest);
      total += weights;
      store(scores + n, weights);
    }
    const float kept = at.highest[r] == kHidden ? 0.0f : std::exp(at.highest[r] - highest);
    at.totals[r] = at.totals[r] * kept + sum_of<W>(total);
    at.highest[r] = highest;
    if (kept != 1.0f)
      for (int64_t x = 0; x < head_dim; x++) at.sums[r * head_dim + x] *= kept;
  }
}

// Whether the mask hides a block of keys from every query of the task: most of them, under a sliding window.
INLINE bool is_hidden(const Task& task, int64_t begin, int64_t count) {
  const Attention& call = *task.call;
  if (call.mask == nullptr) return false;
  for (int64_t query = task.first; query < task.last; query++)
    for (int64_t n = begin; n < begin + count; n++)
      if (call.mask[query * call.keys + n] != kHidden) return false;
  return true;
}

template <int W>
INLINE void run_task(const Task& task, float* memory) {
  const Attention& call = *task.call;
  const int64_t rows = task.rows(), head_dim = call.head_dim, stride = call.kv_heads * head_dim;
  const int64_t end = call.causal ? std::min(call.keys, call.start + task.last) : call.keys;
  const Scratch at(memory, rows, head_dim);
  for (int64_t r = 0; r < rows; r++)
    for (int64_t x = 0; x < head_dim; x++) at.query[r * head_dim + x] = task.query[task.offset(r) + x] * call.scale;
  std::fill(at.sums, at.sums + rows * head_dim, 0.0f);
  std::fill(at.highest, at.highest + rows, kHidden);
  std::fill(at.totals, at.totals + rows, 0.0f);

  for (int64_t begin = 0; begin < end; begin += kBlock) {
    const int64_t count = std::min(kBlock, end - begin);
    if (is_hidden(task, begin, count)) continue;
    score_block<W>(task, at, task.key + begin * stride, count);
    mask_block(task, at, begin, count);
    exponentiate_block<W>(at, rows, head_dim);
    multiply<W, true>(at.scores, kBlock, task.value + begin * stride, stride, at.sums, head_dim, rows, head_dim, count);
  }

  for (int64_t r = 0; r < rows; r++) {
    const float factor = at.totals[r] > 0 ? 1.0f / at.totals[r] : 0.0f;
    float* output = task.output + task.offset(r);
    for (int64_t x = 0; x < head_dim; x++) output[x] = at.sums[r * head_dim + x] * factor;
  }
}

struct Instructions {
  const char* name;
  bool (*supported)();
  void (*run)(const Task&, float* memory);
};

void run_baseline(const Task& task, float* memory) { run_task<4>(task, memory); }  // SSE2, NEON

#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) void run_avx2(const Task& task, float* memory) { run_task<8>(task, memory); }

__attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl"))) void run_avx512(const Task& task,
                                                                                       float* memory) {
  run_task<16>(task, memory);
}

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

// The best first.
constexpr Instructions kInstructions[] = {
#if defined(__x86_64__)
    {"avx512", has_avx512, run_avx512},
    {"avx2", has_avx2, run_avx2},
#endif
    {"baseline", [] { return true; }, run_baseline},
};

const Instructions* find_instructions(const char* name) {
  for (const Instructions& set : kInstructions)
    if ((name == nullptr || std::strcmp(name, set.name) == 0) && set.supported()) return &set;
  return nullptr;
}

const Instructions* instructions = find_instructions(nullptr);

}  // namespace

const char* use_instructions(const char* name) {
  const Instructions* found = find_instructions(name);
  if (found == nullptr) return nullptr;
  instructions = found;
  return found->name;
}

void attend(const Attention& call, int64_t threads) {
  const int64_t groups = call.batches * call.kv_heads, sharing = call.query_heads / call.kv_heads;
  const auto blocks = [&](int64_t queries) { return (call.queries + queries - 1) / queries; };
  int64_t queries = std::clamp<int64_t>(kRowsOfTask / sharing, 1, call.queries);
  while (queries > 4 && groups * blocks(queries) < 2 * threads) queries /= 2;
  // A decode step may have fewer KV heads than threads: then the heads that share one are split too.
  int64_t heads = sharing;
  while (heads % 2 == 0 && groups * blocks(queries) * (sharing / heads) < threads) heads /= 2;
  const int64_t parts = sharing / heads, tasks = groups * blocks(queries) * parts;

  executorch::extension::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    thread_local std::vector<float> memory;
    memory.resize(std::max<size_t>(memory.size(), Scratch::size(queries * heads, call.head_dim)));
    for (int64_t index = begin; index < end; index++) {
      const int64_t part = index % parts, group = index / parts / blocks(queries);
      const int64_t block = blocks(queries) - 1 - index / parts % blocks(queries);  // those with the most keys first
      const int64_t batch = group / call.kv_heads, kv_head = group % call.kv_heads;
      const int64_t query_offset =
          (batch * call.queries * call.query_heads + kv_head * sharing + part * heads) * call.head_dim;
      const int64_t key_offset = (batch * call.keys * call.kv_heads + kv_head) * call.head_dim;
      const Task task{&call,
                      call.query + query_offset,
                      call.key + key_offset,
                      call.value + key_offset,
                      call.output + query_offset,
                      heads,
                      block * queries,
                      std::min(call.queries, (block + 1) * queries)};
      instructions->run(task, memory.data());
    }
  });
}

}  // namespace pocketlm
