// The clock of an emulated process whose instructions are counted: it advances by a microsecond whenever it is read.
//
// How long an emulator takes depends on the host and on what else runs there, and a runtime does other work after two
// seconds than after one: onnxruntime's telemetry does. With this library preloaded the same program takes the same way
// every time. Dates begin with the real one; what waits for a moment, as sleeping does, asks the kernel, not this.
#include <sys/syscall.h>
#include <sys/time.h>
#include <unistd.h>

#include <cstdint>
#include <ctime>

namespace {

constexpr std::int64_t kStep = 1000, kSecond = 1'000'000'000;  // nanoseconds

std::int64_t read_clock() {
  static std::int64_t elapsed = 0;
  return __atomic_add_fetch(&elapsed, kStep, __ATOMIC_RELAXED);
}

std::int64_t date() {
  static const std::int64_t start = [] {
    timespec now{};
    syscall(SYS_clock_gettime, CLOCK_REALTIME, &now);
    return now.tv_sec;
  }();
  return start;
}

}  // namespace

extern "C" {

int clock_gettime(clockid_t clock, timespec* result) noexcept {
  const std::int64_t now = read_clock();
  result->tv_sec = now / kSecond + (clock == CLOCK_REALTIME ? date() : 0);
  result->tv_nsec = now % kSecond;
  return 0;
}

int gettimeofday(timeval* __restrict result, void* __restrict) noexcept {
  const std::int64_t now = read_clock();
  result->tv_sec = date() + now / kSecond;
  result->tv_usec = now % kSecond / 1000;
  return 0;
}

time_t time(time_t* result) noexcept {
  const time_t now = date() + read_clock() / kSecond;
  if (result != nullptr) *result = now;
  return now;
}
}
