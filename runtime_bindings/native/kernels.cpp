#include "kernels.h"

#include <executorch/extension/kernel_util/make_boxed_from_unboxed_functor.h>
#include <executorch/runtime/core/exec_aten/util/tensor_util.h>
#include <executorch/runtime/kernel/thread_parallel_interface.h>

#include <cmath>
#include <cstring>
#include <optional>

#include "attention.h"

namespace pocketlm {
namespace {

using executorch::aten::ScalarType;
using executorch::aten::Tensor;
using executorch::runtime::KernelRuntimeContext;

// A program of a stranger may call a kernel with anything: it fails then, and the session goes on.
#define REQUIRE(condition, ...) ET_KERNEL_CHECK_MSG(context, condition, InvalidArgument, out, __VA_ARGS__)

bool is_float(const Tensor& tensor, int dimensions) {
  return tensor.dim() == dimensions && tensor.scalar_type() == ScalarType::Float &&
         (tensor.numel() == 0 || tensor.const_data_ptr() != nullptr);
}

// The vendor's signature. Dropout is for training and is not looked at.
Tensor& custom_sdpa(KernelRuntimeContext& context, const Tensor& query, const Tensor& key, const Tensor& value,
                    int64_t start, const std::optional<Tensor>& mask, double /*dropout*/, bool causal,
                    const std::optional<double>& scale, Tensor& out) {
  for (const Tensor* tensor : {&query, &key, &value})
    REQUIRE(is_float(*tensor, 4), "custom_sdpa: query, key and value must be float32 [batch, positions, heads, size]");
  const int64_t batches = query.size(0), queries = query.size(1), heads = query.size(2), head_dim = query.size(3);
  const int64_t keys = key.size(1), kv_heads = key.size(2);
  for (const Tensor* tensor : {&key, &value})
    REQUIRE(tensor->size(0) == batches && tensor->size(1) == keys && tensor->size(2) == kv_heads &&
                tensor->size(3) == head_dim,
            "custom_sdpa: query, key and value do not agree");
  REQUIRE(kv_heads > 0 && heads % kv_heads == 0, "custom_sdpa: %d heads on %d", int(heads), int(kv_heads));
  REQUIRE(start >= 0 && start <= keys - queries, "custom_sdpa: %d positions from %lld on, but only %d keys",
          int(queries), static_cast<long long>(start), int(keys));
  const bool masked = mask.has_value() && mask->numel() > 0;
  REQUIRE(!(masked && causal), "custom_sdpa: a mask or is_causal, not both");
  REQUIRE(!masked || (is_float(*mask, 2) && mask->size(0) == queries && mask->size(1) == keys),
          "custom_sdpa: the mask must be float32 [queries, keys]");
  REQUIRE(out.scalar_type() == ScalarType::Float, "custom_sdpa: the result is float32");
  REQUIRE(executorch::runtime::resize_tensor(out, query.sizes()) == executorch::runtime::Error::Ok && is_float(out, 4),
          "custom_sdpa: the result can't take the query's shape");
  if (query.numel() == 0) return out;
  attend(
      {query.const_data_ptr<float>(), key.const_data_ptr<float>(), value.const_data_ptr<float>(),
       masked ? mask->const_data_ptr<float>() : nullptr, out.mutable_data_ptr<float>(), batches, queries, keys, heads,
       kv_heads, head_dim, start, causal, static_cast<float>(scale.value_or(1.0 / std::sqrt(double(head_dim))))},
      executorch::extension::get_thread_count());
  return out;
}

// Whether rows of value [batch, positions, heads, size] are rows of cache.
bool fits(const Tensor& value, const Tensor& cache) {
  return value.dim() == 4 && cache.dim() == 4 && value.scalar_type() == cache.scalar_type() &&
         value.size(0) == cache.size(0) && value.size(2) == cache.size(2) && value.size(3) == cache.size(3) &&
         (value.numel() == 0 || (value.const_data_ptr() != nullptr && cache.const_data_ptr() != nullptr));
}

// Writes row `row` of value to position `position` of its batch in the cache, for `count` rows.
void copy_rows(const Tensor& value, Tensor& cache, int64_t row, int64_t position, int64_t count) {
  const int64_t bytes = value.size(2) * value.size(3) * value.element_size();
  const int64_t batch = row / value.size(1);
  std::memcpy(static_cast<char*>(cache.mutable_data_ptr()) + (batch * cache.size(1) + position) * bytes,
              static_cast<const char*>(value.const_data_ptr()) + row * bytes, count * bytes);
}

// The vendor's signature, as below; `out` is a placeholder that is never written.
Tensor& update_cache(KernelRuntimeContext& context, const Tensor& value, Tensor& cache, int64_t start, Tensor& out) {
  REQUIRE(fits(value, cache), "update_cache: value and cache do not agree");
  const int64_t count = value.size(1);
  REQUIRE(start >= 0 && start <= cache.size(1) - count, "update_cache: %d positions from %lld on, but the cache has %d",
          int(count), static_cast<long long>(start), int(cache.size(1)));
  if (value.numel() == 0) return out;
  for (int64_t batch = 0; batch < value.size(0); batch++) copy_rows(value, cache, batch * count, start, count);
  return out;
}

Tensor& update_cache_with_indices(KernelRuntimeContext& context, const Tensor& value, Tensor& cache, int64_t /*start*/,
                                  const Tensor& indices, Tensor& out) {
  REQUIRE(fits(value, cache), "update_cache_with_indices: value and cache do not agree");
  REQUIRE(indices.dim() == 2 && indices.scalar_type() == ScalarType::Long && indices.size(0) == value.size(0) &&
              indices.size(1) == value.size(1),
          "update_cache_with_indices: indices must be int64 [batch, positions]");
  if (value.numel() == 0) return out;
  const int64_t* positions = indices.const_data_ptr<int64_t>();
  REQUIRE(positions != nullptr, "update_cache_with_indices: no indices");
  for (int64_t row = 0; row < indices.numel(); row++)
    REQUIRE(positions[row] >= 0 && positions[row] < cache.size(1),
            "update_cache_with_indices: position %lld, but the cache has %d", static_cast<long long>(positions[row]),
            int(cache.size(1)));
  for (int64_t row = 0; row < indices.numel(); row++) copy_rows(value, cache, row, positions[row], 1);
  return out;
}

constexpr char kSdpa[] = "llama::custom_sdpa.out";
constexpr char kUpdate[] = "llama::update_cache.out";
constexpr char kUpdateWithIndices[] = "llama::update_cache_with_indices.out";

}  // namespace

const std::vector<executorch::runtime::Kernel>& attention_kernels() {
  using executorch::extension::make_boxed_kernel;
  static const std::vector<executorch::runtime::Kernel> kernels{
      make_boxed_kernel(kSdpa, EXECUTORCH_FN(custom_sdpa, kSdpa)),
      make_boxed_kernel(kUpdate, EXECUTORCH_FN(update_cache, kUpdate)),
      make_boxed_kernel(kUpdateWithIndices, EXECUTORCH_FN(update_cache_with_indices, kUpdateWithIndices)),
  };
  return kernels;
}

}  // namespace pocketlm
