// A .pte through ExecuTorch's C++ Module, loaded as phones do: with XNNPACK's weight cache, which the Python binding
// can't switch on. The kernels are those that the process has registered before.
#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>
#include <executorch/runtime/backend/backend_options_map.h>
#include <executorch/runtime/backend/options.h>

#include <algorithm>
#include <vector>

using executorch::extension::make_tensor_ptr;
using executorch::extension::Module;
using executorch::runtime::Error;

extern "C" {

// load_mode: Module::LoadMode. packed_cache_path may be empty. Null on failure.
void* program_open(const char* path, int load_mode, const char* packed_cache_path) {
  executorch::runtime::BackendOptions<2> options;
  executorch::runtime::LoadBackendOptionsMap map;
  auto* module = new Module(path, static_cast<Module::LoadMode>(load_mode));
  if (options.set_option("weight_cache_enabled", true) == Error::Ok &&
      (!*packed_cache_path || options.set_option("packed_cache_path", packed_cache_path) == Error::Ok) &&
      map.set_options("XnnpackBackend", options.view()) == Error::Ok && module->load(map) == Error::Ok &&
      module->load_forward() == Error::Ok) {
    return module;
  }
  delete module;
  return nullptr;
}

// Copies up to `capacity` logits; returns how many there were, or -1.
int64_t program_run(void* program, const int64_t* ids, int length, int64_t position, float* logits, int64_t capacity) {
  auto tokens = make_tensor_ptr({1, length}, std::vector<int64_t>(ids, ids + length));
  auto start = make_tensor_ptr({1}, std::vector<int64_t>{position});
  auto result = static_cast<Module*>(program)->forward({*tokens, *start});
  if (!result.ok()) {
    return -1;
  }
  auto tensor = result->at(0).toTensor();
  std::copy_n(tensor.const_data_ptr<float>(), std::min<int64_t>(tensor.numel(), capacity), logits);
  return tensor.numel();
}

void program_close(void* program) { delete static_cast<Module*>(program); }
}
