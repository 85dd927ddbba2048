// State of the GPU that does nothing: events, the device's properties, its memory.
#include "nullgpu.h"

#include <dlfcn.h>
#include <sys/mman.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

namespace nullgpu {
namespace {

using Hook = void (*)(int kind, const char *name, long a, long b, long c, long d);
std::atomic<Hook> hook{nullptr};
std::atomic<long> counts[KINDS];
std::atomic<int> byte_read{0};

class Ranges {  // address ranges, by their start
 public:
  void add(const void *start, std::size_t bytes) {
    std::lock_guard<std::mutex> guard(lock_);
    ranges_[reinterpret_cast<uintptr_t>(start)] = bytes;
  }
  bool remove(const void *start, std::size_t *bytes = nullptr) {
    std::lock_guard<std::mutex> guard(lock_);
    auto found = ranges_.find(reinterpret_cast<uintptr_t>(start));
    if (found == ranges_.end()) return false;
    if (bytes) *bytes = found->second;
    ranges_.erase(found);
    return true;
  }
  bool contain(const void *pointer) {
    const auto at = reinterpret_cast<uintptr_t>(pointer);
    std::lock_guard<std::mutex> guard(lock_);
    auto after = ranges_.upper_bound(at);
    if (after == ranges_.begin()) return false;
    --after;
    return at < after->first + after->second;
  }

 private:
  std::mutex lock_;
  std::map<uintptr_t, std::size_t> ranges_;
};

// Never destroyed: libraries still call at exit.
Ranges &device_ranges() { static auto *r = new Ranges; return *r; }
Ranges &pinned_ranges() { static auto *r = new Ranges; return *r; }

std::atomic<long> used{0};
constexpr long CONTEXT = 600L << 20;  // what a process's context takes of a real GPU
thread_local int current = 0;

long number(const char *name, long otherwise) {
  const char *value = std::getenv(name);
  return value && *value ? std::atol(value) : otherwise;
}

Device described() {
  Device d{};
  d.capability = static_cast<int>(number("NULLGPU_CAPABILITY", 90));
  d.bytes = number("NULLGPU_GIB", 140) << 30;
  d.count = static_cast<int>(number("NULLGPU_DEVICES", 1));
  // Of A100, RTX 4090, H200, B200 and RTX 5090.
  switch (d.capability) {
    case 80: d.multiprocessors = 108; d.shared = 163 << 10; break;
    case 89: d.multiprocessors = 128; d.shared = 99 << 10; break;
    case 90: d.multiprocessors = 132; d.shared = 227 << 10; break;
    case 100: d.multiprocessors = 148; d.shared = 227 << 10; break;
    case 120: d.multiprocessors = 170; d.shared = 99 << 10; break;
    default:
      std::fprintf(stderr, "nullgpu: NULLGPU_CAPABILITY is %d; use 80, 89, 90, 100 or 120\n", d.capability);
      std::_Exit(2);
  }
  std::snprintf(d.name, sizeof d.name, "null GPU sm_%d", d.capability);
  return d;
}

long answer_zero(...) { return 0; }

}  // namespace

void report(Kind kind, const char *name, long a, long b, long c, long d) {
  counts[kind].fetch_add(1, std::memory_order_relaxed);
  if (kind == ALLOCATE || kind == FREE) return;
  if (Hook call = hook.load(std::memory_order_acquire)) call(kind, name, a, b, c, d);
}

const Device &device() {
  static const Device d = described();
  return d;
}

int attribute(int which) {
  const Device &d = device();
  switch (which) {  // numbers of cudaDeviceAttr
    case 1: return 1024;                      // threads in a block
    case 2: case 3: return 1024;              // a block's x and y
    case 4: return 64;                        // its z
    case 5: return 2147483647;                // a grid's x
    case 6: case 7: return 65535;             // its y and z
    case 8: return 48 << 10;                  // shared memory of a block, unless it asks for more
    case 10: return 32;                       // warp
    case 12: case 82: return 65536;           // registers of a block, of a multiprocessor
    case 13: return 1980000;                  // clock, kHz
    case 16: return d.multiprocessors;
    case 36: return 3201000;                  // memory clock, kHz
    case 37: return 5120;                     // memory bus, bits
    case 38: return 50 << 20;                 // L2
    case 39: return d.capability == 89 || d.capability == 120 ? 1536 : 2048;  // threads of a multiprocessor
    case 41: return 1;                        // unified addressing
    case 75: return d.capability / 10;
    case 76: return d.capability % 10;
    case 81: return d.shared + 1024;          // shared memory of a multiprocessor
    case 95: return 1;                        // cooperative launches
    case 97: return d.shared;
    case 102: return 1;                       // virtual memory management (expandable segments)
    case 106: return d.capability == 89 ? 24 : 32;  // blocks of a multiprocessor
    default: return 0;
  }
}

int current_device() { return current; }
void set_current_device(int at) { current = at; }

bool take(std::size_t bytes) {
  if (used.load() + static_cast<long>(bytes) > device().bytes - CONTEXT) return false;
  report(ALLOCATE, "allocate", static_cast<long>(bytes), used += static_cast<long>(bytes));
  return true;
}

void give(std::size_t bytes) { report(FREE, "free", used -= static_cast<long>(bytes)); }

void map_device(void *pointer, std::size_t bytes) { device_ranges().add(pointer, bytes); }
void unmap_device(void *pointer) { device_ranges().remove(pointer); }
bool on_device(const void *pointer) { return device_ranges().contain(pointer); }
long free_bytes() { return device().bytes - CONTEXT - used.load(); }

bool allocate(void **pointer, std::size_t bytes) {
  if (!take(bytes)) return false;
  // Readable, because the program may compute with what a copy left of it; pages that are never touched cost nothing.
  void *start = mmap(nullptr, bytes ? bytes : 1, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (start == MAP_FAILED) {
    give(bytes);
    return false;
  }
  map_device(start, bytes);
  *pointer = start;
  return true;
}

void release(void *pointer) {
  std::size_t bytes = 0;
  if (!pointer || !device_ranges().remove(pointer, &bytes)) return;
  munmap(pointer, bytes ? bytes : 1);
  give(bytes);
}

void pin(void *pointer, std::size_t bytes) { pinned_ranges().add(pointer, bytes); }
void unpin(void *pointer) { pinned_ranges().remove(pointer); }
bool pinned(const void *pointer) { return pinned_ranges().contain(pointer); }

void copy(const char *name, void *to, const void *from, std::size_t bytes) {
  const bool to_device = on_device(to), from_device = on_device(from);
  const int direction = (to_device ? HOST_TO_DEVICE : 0) + (from_device ? DEVICE_TO_HOST : 0);
  bool is_pinned = true;
  if (direction == HOST_TO_DEVICE) is_pinned = pinned(from);
  if (direction == DEVICE_TO_HOST) is_pinned = pinned(to);
  report(COPY, name, direction, static_cast<long>(bytes), is_pinned);
  // One byte is a bool, the answer to "are these equal?", which the recorder may want to be yes.
  if (direction == DEVICE_TO_HOST) std::memset(to, bytes == 1 ? byte_read.load() : 0, bytes);
  if (direction == HOST_TO_HOST) std::memmove(to, from, bytes);
}

bool launch(Kind kind, const char *name, long x, long y, long z, long threads, long shared) {
  const bool possible = x >= 1 && y >= 1 && z >= 1 && y <= 65535 && z <= 65535 && threads >= 1 && threads <= 1024 &&
                        shared <= device().shared;
  report(possible ? kind : BAD, name, x, y, z, threads);
  return possible;
}

void *handle() { return std::calloc(1, 256); }

void *lookup(const char *name) {
  void *found = dlsym(RTLD_DEFAULT, name);
  return found ? found : reinterpret_cast<void *>(answer_zero);
}

}  // namespace nullgpu

NULLGPU_API void nullgpu_set_hook(nullgpu::Hook hook) { nullgpu::hook.store(hook); }
NULLGPU_API long nullgpu_count(int kind) { return nullgpu::counts[kind].load(); }
// What a copy of a single byte from the device gives: 1 makes a comparison on the device come out true.
NULLGPU_API void nullgpu_set_byte_read(int value) { nullgpu::byte_read.store(value); }
NULLGPU_API void nullgpu_unmodelled(const char *name) { nullgpu::report(nullgpu::UNMODELLED, name); }
