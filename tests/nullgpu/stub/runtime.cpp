// The CUDA runtime, and the entry points that nvcc's generated code calls.
#include <cuda_runtime_api.h>

#include <cstdlib>
#include <cstdio>
#include <cstring>
#include <string>
#include <unordered_map>

#include "nullgpu.h"

using namespace nullgpu;

namespace {
thread_local cudaError_t last = cudaSuccess;
cudaError_t failed(cudaError_t error) { return last = error; }

// Host address of a kernel's stub -> its mangled name. Filled while libraries load, which is one thread at a time.
std::unordered_map<const void *, std::string> &kernels() {
  static auto *names = new std::unordered_map<const void *, std::string>;
  return *names;
}

cudaError_t start(const void *function, dim3 grid, dim3 block, std::size_t shared) {
  auto found = kernels().find(function);
  const char *name = found == kernels().end() ? "unknown kernel" : found->second.c_str();
  const long threads = static_cast<long>(block.x) * block.y * block.z;
  if (launch(KERNEL, name, grid.x, grid.y, grid.z, threads, static_cast<long>(shared))) return cudaSuccess;
  return failed(cudaErrorInvalidConfiguration);
}

struct Configuration {
  dim3 grid, block;
  std::size_t shared;
  void *stream;
};
thread_local Configuration pushed;
}  // namespace

extern "C" {
// ---- memory
NULLGPU_API cudaError_t cudaMalloc(void **pointer, size_t bytes) {
  return allocate(pointer, bytes) ? cudaSuccess : failed(cudaErrorMemoryAllocation);
}
NULLGPU_API cudaError_t cudaFree(void *pointer) { release(pointer); return cudaSuccess; }
NULLGPU_API cudaError_t cudaMallocAsync(void **pointer, size_t bytes, cudaStream_t) { return cudaMalloc(pointer, bytes); }
NULLGPU_API cudaError_t cudaFreeAsync(void *pointer, cudaStream_t) { return cudaFree(pointer); }
NULLGPU_API cudaError_t cudaHostAlloc(void **pointer, size_t bytes, unsigned) {
  if (posix_memalign(pointer, 4096, bytes ? bytes : 1)) return failed(cudaErrorMemoryAllocation);
  pin(*pointer, bytes);
  return cudaSuccess;
}
NULLGPU_API cudaError_t cudaFreeHost(void *pointer) { unpin(pointer); std::free(pointer); return cudaSuccess; }
NULLGPU_API cudaError_t cudaHostRegister(void *pointer, size_t bytes, unsigned) { pin(pointer, bytes); return cudaSuccess; }
NULLGPU_API cudaError_t cudaHostUnregister(void *pointer) { unpin(pointer); return cudaSuccess; }
NULLGPU_API cudaError_t cudaMemGetInfo(size_t *free, size_t *total) {
  *free = static_cast<size_t>(free_bytes());
  *total = static_cast<size_t>(device().bytes);
  return cudaSuccess;
}
NULLGPU_API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes *found, const void *pointer) {
  std::memset(found, 0, sizeof *found);
  const bool device_memory = on_device(pointer), host_memory = pinned(pointer);
  found->type = device_memory ? cudaMemoryTypeDevice : host_memory ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
  found->devicePointer = device_memory || host_memory ? const_cast<void *>(pointer) : nullptr;
  found->hostPointer = host_memory ? const_cast<void *>(pointer) : nullptr;
  found->device = current_device();
  return cudaSuccess;
}
NULLGPU_API cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind) {
  report(WAIT, "cudaMemcpy");
  copy("cudaMemcpy", to, from, bytes);
  return cudaSuccess;
}
NULLGPU_API cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  copy("cudaMemcpyAsync", to, from, bytes);
  return cudaSuccess;
}
NULLGPU_API cudaError_t cudaMemcpyPeerAsync(void *to, int, const void *from, int, size_t bytes, cudaStream_t) {
  copy("cudaMemcpyPeerAsync", to, from, bytes);
  return cudaSuccess;
}
NULLGPU_API cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width,
                                          size_t height, cudaMemcpyKind, cudaStream_t) {
  // Row by row would be counted as many copies; a copy between host and device would be wrong without its rows.
  if (on_device(to) && on_device(from)) report(COPY, "cudaMemcpy2DAsync", DEVICE_TO_DEVICE, static_cast<long>(width * height), 1);
  else for (size_t row = 0; row < height; ++row)
    copy("cudaMemcpy2DAsync", static_cast<char *>(to) + row * to_pitch, static_cast<const char *>(from) + row * from_pitch, width);
  return cudaSuccess;
}
NULLGPU_API cudaError_t cudaMemset(void *, int, size_t bytes) { report(SET, "cudaMemset", static_cast<long>(bytes)); return cudaSuccess; }
NULLGPU_API cudaError_t cudaMemsetAsync(void *, int, size_t bytes, cudaStream_t) {
  report(SET, "cudaMemsetAsync", static_cast<long>(bytes));
  return cudaSuccess;
}
NULLGPU_API cudaError_t cudaGetSymbolAddress(void **pointer, const void *) { *pointer = handle(); return cudaSuccess; }
NULLGPU_API cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t *pool, int) { *pool = static_cast<cudaMemPool_t>(handle()); return cudaSuccess; }
NULLGPU_API cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t, cudaMemPoolAttr, void *value) { *static_cast<uint64_t *>(value) = 0; return cudaSuccess; }

// ---- devices
NULLGPU_API cudaError_t cudaGetDeviceCount(int *count) {
  // As the driver does; torch hands the list on to nobody else.
  const char *visible = std::getenv("CUDA_VISIBLE_DEVICES");
  *count = device().count;
  if (visible) {
    int named = *visible && std::strcmp(visible, "-1") ? 1 : 0;
    for (const char *at = visible; named && *at; ++at) named += *at == ',';
    if (named < *count) *count = named;
  }
  return *count ? cudaSuccess : failed(cudaErrorNoDevice);
}
NULLGPU_API cudaError_t cudaGetDevice(int *at) { *at = current_device(); return cudaSuccess; }
NULLGPU_API cudaError_t cudaSetDevice(int at) { set_current_device(at); return cudaSuccess; }
NULLGPU_API cudaError_t cudaDriverGetVersion(int *version) { *version = CUDART_VERSION; return cudaSuccess; }
NULLGPU_API cudaError_t cudaRuntimeGetVersion(int *version) { *version = CUDART_VERSION; return cudaSuccess; }
NULLGPU_API cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr which, int) { *value = attribute(which); return cudaSuccess; }
NULLGPU_API cudaError_t cudaGetDeviceProperties(cudaDeviceProp *found, int at) {
  const Device &d = device();
  std::memset(found, 0, sizeof *found);
  std::strcpy(found->name, d.name);
  found->totalGlobalMem = static_cast<size_t>(d.bytes);
  found->sharedMemPerBlock = static_cast<size_t>(attribute(8));
  found->sharedMemPerBlockOptin = static_cast<size_t>(d.shared);
  found->sharedMemPerMultiprocessor = static_cast<size_t>(attribute(81));
  found->regsPerBlock = found->regsPerMultiprocessor = attribute(12);
  found->warpSize = attribute(10);
  found->maxThreadsPerBlock = attribute(1);
  for (int axis = 0; axis < 3; ++axis) {
    found->maxThreadsDim[axis] = attribute(2 + axis);
    found->maxGridSize[axis] = attribute(5 + axis);
  }
  found->major = attribute(75);
  found->minor = attribute(76);
  found->multiProcessorCount = d.multiprocessors;
  found->l2CacheSize = attribute(38);
  found->maxThreadsPerMultiProcessor = attribute(39);
  found->maxBlocksPerMultiProcessor = attribute(106);
  found->memoryBusWidth = attribute(37);
  found->unifiedAddressing = found->concurrentKernels = found->cooperativeLaunch = 1;
  found->asyncEngineCount = 3;
  found->pciBusID = at;
  return cudaSuccess;
}
NULLGPU_API cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; return cudaSuccess; }
NULLGPU_API cudaError_t cudaDeviceCanAccessPeer(int *can, int, int) { *can = 1; return cudaSuccess; }
NULLGPU_API cudaError_t cudaDeviceGetPCIBusId(char *text, int length, int at) { std::snprintf(text, static_cast<size_t>(length), "0000:%02x:00.0", at); return cudaSuccess; }

// ---- errors
NULLGPU_API cudaError_t cudaGetLastError() { cudaError_t was = last; last = cudaSuccess; return was; }
NULLGPU_API cudaError_t cudaPeekAtLastError() { return last; }
NULLGPU_API const char *cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorNoDevice: return "no CUDA-capable device is detected";
    default: return "unknown error";
  }
}
NULLGPU_API const char *cudaGetErrorName(cudaError_t error) { return error ? "cudaError" : "cudaSuccess"; }

// ---- streams and events: nothing is ever pending
NULLGPU_API cudaError_t cudaStreamCreate(cudaStream_t *stream) { *stream = static_cast<cudaStream_t>(handle()); return cudaSuccess; }
NULLGPU_API cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned, int) { return cudaStreamCreate(stream); }
NULLGPU_API cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
NULLGPU_API cudaError_t cudaStreamSynchronize(cudaStream_t) { report(WAIT, "cudaStreamSynchronize"); return cudaSuccess; }
NULLGPU_API cudaError_t cudaDeviceSynchronize() { report(WAIT, "cudaDeviceSynchronize"); return cudaSuccess; }
NULLGPU_API cudaError_t cudaEventSynchronize(cudaEvent_t) { report(WAIT, "cudaEventSynchronize"); return cudaSuccess; }
NULLGPU_API cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }
NULLGPU_API cudaError_t cudaStreamQuery(cudaStream_t) { return cudaSuccess; }
NULLGPU_API cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus *status) { *status = cudaStreamCaptureStatusNone; return cudaSuccess; }
NULLGPU_API cudaError_t cudaStreamGetPriority(cudaStream_t, int *priority) { *priority = 0; return cudaSuccess; }
NULLGPU_API cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus *status, unsigned long long *id, cudaGraph_t *,
                                                 const cudaGraphNode_t **, const cudaGraphEdgeData **, size_t *count) {
  *status = cudaStreamCaptureStatusNone;
  if (id) *id = 0;
  if (count) *count = 0;
  return cudaSuccess;
}
NULLGPU_API cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode *) { return cudaSuccess; }
NULLGPU_API cudaError_t cudaEventCreate(cudaEvent_t *event) { *event = static_cast<cudaEvent_t>(handle()); return cudaSuccess; }
NULLGPU_API cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned) { return cudaEventCreate(event); }
NULLGPU_API cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }
NULLGPU_API cudaError_t cudaEventQuery(cudaEvent_t) { return cudaSuccess; }
NULLGPU_API cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
NULLGPU_API cudaError_t cudaEventRecordWithFlags(cudaEvent_t, cudaStream_t, unsigned) { return cudaSuccess; }
// Not a time, but a number that a benchmark can divide by.
NULLGPU_API cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t, cudaEvent_t) { *milliseconds = 1.0f; return cudaSuccess; }
NULLGPU_API cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t function, void *data) { function(data); return cudaSuccess; }

// ---- kernels
NULLGPU_API cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *found, const void *) {
  std::memset(found, 0, sizeof *found);
  found->maxThreadsPerBlock = 1024;
  found->numRegs = 32;
  // torch's wheels have no code of their own for 8.9, which runs that of 8.6; CUB looks for a version that was compiled.
  found->binaryVersion = found->ptxVersion = device().capability == 89 ? 86 : device().capability;
  found->maxDynamicSharedSizeBytes = attribute(8);
  return cudaSuccess;
}
NULLGPU_API cudaError_t cudaFuncSetAttribute(const void *, cudaFuncAttribute, int) { return cudaSuccess; }
NULLGPU_API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *, int, size_t) { *blocks = 2; return cudaSuccess; }
NULLGPU_API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *, int, size_t, unsigned) { *blocks = 2; return cudaSuccess; }
NULLGPU_API cudaError_t cudaLaunchKernel(const void *function, dim3 grid, dim3 block, void **, size_t shared, cudaStream_t) { return start(function, grid, block, shared); }
NULLGPU_API cudaError_t cudaLaunchCooperativeKernel(const void *function, dim3 grid, dim3 block, void **, size_t shared, cudaStream_t) { return start(function, grid, block, shared); }
NULLGPU_API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *function, void **) {
  return start(function, config->gridDim, config->blockDim, config->dynamicSmemBytes);
}

// ---- what nvcc generates
NULLGPU_API cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **, size_t shared, cudaStream_t) {
  return start(reinterpret_cast<const void *>(kernel), grid, block, shared);
}
NULLGPU_API cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void *>(function));
  return cudaSuccess;
}
NULLGPU_API void **__cudaRegisterFatBinary(void *) { return static_cast<void **>(handle()); }
NULLGPU_API void __cudaRegisterFatBinaryEnd(void **) {}
NULLGPU_API void __cudaUnregisterFatBinary(void **) {}
NULLGPU_API char __cudaInitModule(void **) { return 0; }
NULLGPU_API void __cudaRegisterFunction(void **, const char *function, char *, const char *name, int, void *, void *, void *, void *, int *) {
  kernels()[function] = name;
}
NULLGPU_API void __cudaRegisterVar(void **, char *, char *, const char *, int, size_t, int, int) {}
NULLGPU_API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
  pushed = {grid, block, shared, stream};
  return 0;
}
NULLGPU_API cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
  *grid = pushed.grid;
  *block = pushed.block;
  *shared = pushed.shared;
  *static_cast<void **>(stream) = pushed.stream;
  return cudaSuccess;
}
NULLGPU_API cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned, unsigned long long, cudaDriverEntryPointQueryResult *status) {
  *function = lookup(name);
  if (status) *status = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
}
