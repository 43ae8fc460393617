// ExecuTorch's kernels of attention, which its wheel has in a library linked to torch only.
#pragma once

#include <executorch/runtime/kernel/operator_registry.h>

#include <vector>

namespace pocketlm {

// llama::custom_sdpa, update_cache and update_cache_with_indices, to be given to each method that is loaded. They don't
// go into the global registry, where the vendor's library, loaded into the same process, would meet them and abort.
const std::vector<executorch::runtime::Kernel>& attention_kernels();

}  // namespace pocketlm
