// Programs of ExecuTorch behind a C interface that ctypes can call. Linked to the C++ libraries of the executorch
// wheel, never to libtorch. A session belongs to one thread at a time.
#include <executorch/devtools/etdump/etdump_flatcc.h>
#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>
#include <executorch/runtime/backend/backend_options_map.h>
#include <executorch/runtime/backend/options.h>
#include <executorch/runtime/platform/platform.h>
#include <executorch/runtime/platform/runtime.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "attention.h"
#include "kernels.h"

namespace et = executorch::runtime;
using executorch::extension::Module;

// The wheel has the library of the thread pool and not its header: what is used of the class, neither virtual.
namespace executorch::extension::threadpool {
class ThreadPool {
 public:
  size_t get_thread_count() const;
  bool _unsafe_reset_threadpool(uint32_t threads);
};
ThreadPool* get_threadpool();
}  // namespace executorch::extension::threadpool

namespace {

// What ExecuTorch logs as an error while this thread is in a call of this library: its error codes say little. All else
// goes where it went before, for the vendor's binding may be in the same process.
thread_local std::string* reasons = nullptr;
pal_emit_log_message_method emit_as_before = nullptr;

// Each kernel is looked up among a method's own before it is found among all: that one is missing there is no error.
bool is_noise(const char* file) { return std::string(file).find("operator_registry") != std::string::npos; }

void emit_log_message(et_timestamp_t time, et_pal_log_level_t level, const char* file, const char* function,
                      size_t line, const char* message, size_t length) {
  constexpr size_t kLongest = 1000;
  if (reasons == nullptr || level == et_pal_log_level_t::kFatal) {  // fatal: the process ends
    emit_as_before(time, level, file, function, line, message, length);
  } else if (level == et_pal_log_level_t::kError && reasons->size() < kLongest && !is_noise(file)) {
    if (!reasons->empty()) reasons->append("; ");
    reasons->append(message, length);
  }
}

// Collects the reasons of the calling thread while it lives.
class CapturedLog {
 public:
  CapturedLog() { reasons = &text_; }
  ~CapturedLog() { reasons = nullptr; }
  CapturedLog(const CapturedLog&) = delete;
  CapturedLog& operator=(const CapturedLog&) = delete;
  const std::string& text() const { return text_; }

 private:
  std::string text_;
};

// Also after the vendor's binding, loaded meanwhile, has taken the log for itself.
void start_runtime() {
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto current = et::get_pal_impl()->emit_log_message;
  if (current == emit_log_message) return;
  emit_as_before = current;
  et::register_pal(et::PalImpl::create(emit_log_message, __FILE__));
  et::runtime_init();
}

// The memory that a method plans: activations and caches. Mapped, so that it is taken page by page where it is written.
class PlannedMemory {
 public:
  explicit PlannedMemory(const et::MethodMeta& method) {
    for (size_t index = 0; index < method.num_memory_planned_buffers(); index++) {
      const auto planned = method.memory_planned_buffer_size(index);
      const size_t size = planned.ok() ? static_cast<size_t>(*planned) : 0;
      void* memory =
          size == 0 ? nullptr : mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (memory == MAP_FAILED) {
        missing_ = size;
        return;
      }
      buffers_.emplace_back(static_cast<uint8_t*>(memory), size);
    }
    allocator_.emplace(et::Span<et::Span<uint8_t>>(buffers_.data(), buffers_.size()));
  }
  ~PlannedMemory() {
    for (const auto& buffer : buffers_)
      if (buffer.size() > 0) munmap(buffer.data(), buffer.size());
  }
  PlannedMemory(const PlannedMemory&) = delete;
  PlannedMemory& operator=(const PlannedMemory&) = delete;

  size_t missing() const { return missing_; }  // bytes of a buffer that the system refused; 0 if all is there
  et::HierarchicalAllocator* allocator() { return &*allocator_; }

 private:
  std::vector<et::Span<uint8_t>> buffers_;
  std::optional<et::HierarchicalAllocator> allocator_;
  size_t missing_ = 0;
};

}  // namespace

extern "C" {

#define EXPORTED __attribute__((visibility("default")))
constexpr int kMostDimensions = 8;

// dtype is ExecuTorch's ScalarType; data is dense and row-major.
struct pocketlm_tensor {
  int32_t dtype;
  int32_t dimensions;
  int64_t sizes[kMostDimensions];
  void* data;
};

struct pocketlm_session {
  std::string error, log;                                                  // of the last call
  std::unordered_map<std::string, std::unique_ptr<PlannedMemory>> memory;  // outlives the methods of the module
  std::unique_ptr<Module> module;
  executorch::etdump::ETDumpGen* trace = nullptr;  // owned by the module; null without profiling
  std::vector<et::EValue> outputs;                 // of the last call
};
}

namespace {

using executorch::aten::ScalarType;
using executorch::aten::Tensor;
using executorch::extension::TensorPtr;

// One function of the C interface: its failure becomes the session's error, with the reasons that were logged.
class Call {
 public:
  explicit Call(pocketlm_session& session) : session_(session) { session.error.clear(); }
  ~Call() { session_.log = log_.text(); }

  int fail(const std::string& what) {
    session_.error = what + (log_.text().empty() ? "" : ": " + log_.text());
    return -1;
  }
  int fail(const std::string& what, et::Error error) { return fail(what + ": " + et::to_string(error)); }

 private:
  pocketlm_session& session_;
  CapturedLog log_;
};

et::Error load_program(Module& module, const char* packed_weights) {
  constexpr auto kVerified = et::Program::Verification::InternalConsistency;  // of the flatbuffer's offsets
  if (packed_weights == nullptr) return module.load(kVerified);
  et::BackendOptions<2> options;
  et::LoadBackendOptionsMap map;
  for (et::Error error :
       {options.set_option("packed_cache_path", packed_weights), options.set_option("weight_cache_enabled", true),
        map.set_options("XnnpackBackend", options.view())})
    if (error != et::Error::Ok) return error;
  return module.load(map, kVerified);  // which copies the map
}

template <class Sizes>
bool describe(ScalarType dtype, const Sizes& sizes, pocketlm_tensor& tensor) {
  if (sizes.size() > kMostDimensions) return false;
  tensor = {static_cast<int32_t>(dtype), static_cast<int32_t>(sizes.size()), {}, nullptr};
  std::copy(sizes.begin(), sizes.end(), tensor.sizes);
  return true;
}

}  // namespace

extern "C" {

// The version of ExecuTorch whose headers were compiled in. Another's classes may have another layout, and nothing
// would tell: whoever loads this library has to compare.
EXPORTED const char* pocketlm_built_for() { return POCKETLM_EXECUTORCH_VERSION; }

// See use_instructions.
EXPORTED const char* pocketlm_use_instructions(const char* name) { return pocketlm::use_instructions(name); }

// Sets the process's number of threads if `count` is positive, which no session may survive; returns the number.
EXPORTED int pocketlm_threads(int count) {
  start_runtime();
  const CapturedLog quiet;
  auto* pool = executorch::extension::threadpool::get_threadpool();
  if (count > 0) pool->_unsafe_reset_threadpool(static_cast<uint32_t>(count));
  return static_cast<int>(pool->get_thread_count());
}

// Maps a program. packed_weights: a file of XNNPACK's packed weights, at most 255 bytes of path; it is written if it is
// empty or missing, and mapped if it is not; null packs into memory. Its content is not checked. profile: trace every
// call, see pocketlm_write_trace. Never null; pocketlm_error tells whether it worked.
EXPORTED pocketlm_session* pocketlm_open(const char* path, const char* packed_weights, int profile) {
  start_runtime();
  auto session = std::make_unique<pocketlm_session>();
  Call call(*session);
  std::unique_ptr<executorch::etdump::ETDumpGen> trace;
  if (profile != 0) trace = std::make_unique<executorch::etdump::ETDumpGen>();
  session->trace = trace.get();
  session->module = std::make_unique<Module>(path, Module::LoadMode::Mmap, std::move(trace));
  const et::Error error = load_program(*session->module, packed_weights);
  if (error != et::Error::Ok) call.fail("the program is refused", error);
  return session.release();
}

EXPORTED void pocketlm_close(pocketlm_session* session) {
  session->outputs.clear();
  delete session;
}

// Why the last call failed; empty if it did not.
EXPORTED const char* pocketlm_error(const pocketlm_session* session) { return session->error.c_str(); }

// What ExecuTorch logged as errors during the last call, though it may have worked.
EXPORTED const char* pocketlm_log(const pocketlm_session* session) { return session->log.c_str(); }

// The declared bounds of a method's inputs, or of its outputs: writes up to `capacity`, returns how many there are, -1
// on failure. A value that is no tensor has dtype -1.
EXPORTED int pocketlm_signature(pocketlm_session* session, const char* method, int of_outputs, pocketlm_tensor* tensors,
                                int capacity) {
  Call call(*session);
  const auto meta = session->module->method_meta(method);
  if (!meta.ok()) return call.fail(method, meta.error());
  const int count = static_cast<int>(of_outputs != 0 ? meta->num_outputs() : meta->num_inputs());
  for (int index = 0; index < std::min(count, capacity); index++) {
    const auto tensor = of_outputs != 0 ? meta->output_tensor_meta(index) : meta->input_tensor_meta(index);
    if (!tensor.ok() || !describe(tensor->scalar_type(), tensor->sizes(), tensors[index]))
      tensors[index] = {-1, 0, {}, nullptr};
  }
  return count;
}

// Prepares a method: its memory, its kernels, its delegates with their packed weights. -1 on failure.
EXPORTED int pocketlm_load(pocketlm_session* session, const char* method) {
  Call call(*session);
  const auto meta = session->module->method_meta(method);
  if (!meta.ok()) return call.fail(method, meta.error());
  auto memory = std::make_unique<PlannedMemory>(*meta);
  if (memory->missing() > 0)
    return call.fail(std::string(method) + " plans " + std::to_string(memory->missing()) + " bytes");
  const et::Error error =
      session->module->load_method(method, memory->allocator(), nullptr, nullptr, pocketlm::attention_kernels());
  if (error != et::Error::Ok) return call.fail(method, error);
  session->memory[method] = std::move(memory);
  return 0;
}

// Runs a loaded method. Inputs are read where they lie; outputs point into the method's memory, valid until it runs
// again. Returns how many outputs there are, up to `capacity` of them written; -1 on failure.
EXPORTED int pocketlm_run(pocketlm_session* session, const char* method, const pocketlm_tensor* inputs, int count,
                          pocketlm_tensor* outputs, int capacity) {
  Call call(*session);
  std::vector<TensorPtr> tensors;
  std::vector<et::EValue> arguments;
  for (int index = 0; index < count; index++) {
    const pocketlm_tensor& input = inputs[index];
    tensors.push_back(executorch::extension::from_blob(
        input.data, std::vector<executorch::aten::SizesType>(input.sizes, input.sizes + input.dimensions),
        static_cast<ScalarType>(input.dtype)));
    arguments.emplace_back(*tensors.back());
  }
  if (!session->module->is_method_loaded(method)) return call.fail(std::string(method) + " is not loaded");
  auto result = session->module->execute(method, arguments);
  if (!result.ok()) return call.fail(method, result.error());
  session->outputs = std::move(*result);
  const int made = static_cast<int>(session->outputs.size());
  for (int index = 0; index < std::min(made, capacity); index++) {
    const et::EValue& value = session->outputs[index];
    if (!value.isTensor()) return call.fail(std::string(method) + ": an output is no tensor");
    const Tensor& tensor = value.toTensor();
    if (!describe(tensor.scalar_type(), tensor.sizes(), outputs[index]))
      return call.fail("an output has too many dimensions");
    outputs[index].data = const_cast<void*>(tensor.const_data_ptr());
    if (outputs[index].data == nullptr && tensor.numel() > 0) return call.fail("an output has no memory");
  }
  return made;
}

// Writes what was traced since the session was opened as an ETDump; -1 on failure.
EXPORTED int pocketlm_write_trace(pocketlm_session* session, const char* path) {
  Call call(*session);
  if (session->trace == nullptr) return call.fail("the session was opened without profiling");
  const executorch::etdump::ETDumpResult dump = session->trace->get_etdump_data();
  const std::unique_ptr<void, decltype(&std::free)> owned(dump.buf, std::free);
  std::FILE* file = dump.buf == nullptr ? nullptr : std::fopen(path, "wb");
  if (file == nullptr) return call.fail("the trace can't be written");
  const bool whole = std::fwrite(dump.buf, 1, dump.size, file) == dump.size;
  return std::fclose(file) == 0 && whole ? 0 : call.fail("the trace can't be written");
}
}
