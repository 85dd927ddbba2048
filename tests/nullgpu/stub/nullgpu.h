// A GPU that does nothing: what the parts of the stub share.
//
// The stub is loaded before torch (LD_PRELOAD) and answers the CUDA runtime, the driver, cuBLAS and NCCL. Device memory is
// reserved address space that nothing touches, kernels are counted and never run, and what a program reads back is zero.
#pragma once
#include <cstdint>

#define NULLGPU_API extern "C" __attribute__((visibility("default")))

namespace nullgpu {

// The numbers are part of the interface: events.py has the same.
enum Kind : int {
  KERNEL = 0,      // a kernel of torch or of a library;           a, b, c: grid, d: threads in a block
  TRITON = 1,      // a kernel that Triton or nvrtc compiled;      the same
  GEMM = 2,        // cuBLAS;                                      a, b, c: m, n, k, d: batch
  SET = 3,         // memset;                                      a: bytes
  COPY = 4,        // memcpy;                                      a: Direction, b: bytes, c: 1 if the host's side is pinned
  WAIT = 5,        // the host waits for the device
  COLLECTIVE = 6,  // NCCL;                                        a: elements, b: NCCL's number of their type
  ALLOCATE = 7,    // device memory from the driver;               a: bytes, b: bytes in use after it
  FREE = 8,        // device memory given back (a GPU waits here); a: bytes in use after it
  BAD = 9,         // a launch that a GPU would refuse;            a, b, c: grid or m, n, k, d: threads or leading dimension
  UNMODELLED = 10, // a call that answers 0 and has no effect here
  KINDS = 11
};

enum Direction : int { HOST_TO_HOST = 0, HOST_TO_DEVICE = 1, DEVICE_TO_HOST = 2, DEVICE_TO_DEVICE = 3 };

// Count an event and pass it to the recorder, if there is one. ALLOCATE and FREE are only counted: the caching allocator
// holds its lock there, and a recorder in Python would wait for the interpreter's lock, whose owner may wait for the first.
void report(Kind kind, const char *name, long a = 0, long b = 0, long c = 0, long d = 0);

struct Device {
  int capability;       // 90 is compute capability 9.0
  int multiprocessors;
  int shared;           // bytes of shared memory that a block may have
  long bytes;           // of memory
  int count;            // devices
  char name[64];        // begins with "null GPU", so that no result can pass for that of hardware
};

// From NULLGPU_CAPABILITY, NULLGPU_GIB and NULLGPU_DEVICES, read once.
const Device &device();
int attribute(int which);      // of cudaDeviceGetAttribute and cuDeviceGetAttribute, which number them alike
int current_device();
void set_current_device(int at);

// Device memory. Both return false where it does not fit.
bool allocate(void **pointer, std::size_t bytes);
bool take(std::size_t bytes);  // of physical memory, for addresses reserved elsewhere
void give(std::size_t bytes);
void release(void *pointer);
void map_device(void *pointer, std::size_t bytes);
void unmap_device(void *pointer);
bool on_device(const void *pointer);
long free_bytes();

void pin(void *pointer, std::size_t bytes);
void unpin(void *pointer);
bool pinned(const void *pointer);

// A copy: the host's memory is written, with zeros where it comes from the device; the device's is not touched.
void copy(const char *name, void *to, const void *from, std::size_t bytes);

// Whether a launch is one that a GPU takes; counts it as `kind`, or as BAD.
bool launch(Kind kind, const char *name, long x, long y, long z, long threads, long shared);

void *handle();                // memory that stands for a stream, an event, a module, ...
void *lookup(const char *name);  // a function by name, one that answers 0 where the stub has none

}  // namespace nullgpu
