// Attention over a KV cache in float32, with no knowledge of ExecuTorch's tensors.
#pragma once

#include <cstdint>

namespace pocketlm {

// One call. Arrays are dense and row-major: query and output [batches, queries, query_heads, head_dim], key and value
// [batches, keys, kv_heads, head_dim], mask [queries, keys] or null. query_heads is a multiple of kv_heads.
struct Attention {
  const float* query;
  const float* key;
  const float* value;
  const float* mask;  // added to the scores
  float* output;
  int64_t batches, queries, keys, query_heads, kv_heads, head_dim;
  int64_t start;  // position of the first query
  bool causal;    // query i sees the keys up to position start + i
  float scale;
};

// Computes call.output on `threads` threads of ExecuTorch's pool. A query that sees no key gets zeros.
void attend(const Attention& call, int64_t threads);

// Chooses the instructions of attend by name: "baseline", and on x86-64 "avx2" and "avx512". Null: the best of this
// CPU. Returns the name of those in use, or null, and changes nothing, for a name that this CPU can't run.
const char* use_instructions(const char* name);

}  // namespace pocketlm
