// The CUDA driver: what Triton's launcher, torch's expandable segments and NVRTC-compiled kernels call.
#include <cuda.h>
#include <sys/mman.h>

#include <cstring>

#include "nullgpu.h"

using namespace nullgpu;

namespace {
struct Physical {  // memory without an address
  std::size_t bytes;
};
CUresult start(CUfunction function, unsigned x, unsigned y, unsigned z, long threads, unsigned shared) {
  const char *name = reinterpret_cast<const char *>(function);
  return launch(TRITON, name, x, y, z, threads, shared) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
}  // namespace

extern "C" {
NULLGPU_API CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
NULLGPU_API CUresult cuDriverGetVersion(int *version) { *version = CUDA_VERSION; return CUDA_SUCCESS; }
NULLGPU_API CUresult cuDeviceGetCount(int *count) { *count = device().count; return CUDA_SUCCESS; }
NULLGPU_API CUresult cuDeviceGet(CUdevice *found, int at) { *found = at; return CUDA_SUCCESS; }
NULLGPU_API CUresult cuDeviceGetName(char *name, int length, CUdevice) { std::strncpy(name, device().name, static_cast<size_t>(length)); return CUDA_SUCCESS; }
NULLGPU_API CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute which, CUdevice) { *value = attribute(which); return CUDA_SUCCESS; }
NULLGPU_API CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned *flags, int *active) { *flags = 0; *active = 1; return CUDA_SUCCESS; }
NULLGPU_API CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice) { static void *one = handle(); *context = static_cast<CUcontext>(one); return CUDA_SUCCESS; }
NULLGPU_API CUresult cuCtxGetCurrent(CUcontext *context) { return cuDevicePrimaryCtxRetain(context, 0); }
NULLGPU_API CUresult cuCtxGetDevice(CUdevice *found) { *found = current_device(); return CUDA_SUCCESS; }
NULLGPU_API CUresult cuCtxSetCurrent(CUcontext) { return CUDA_SUCCESS; }
NULLGPU_API CUresult cuCtxGetLimit(size_t *value, CUlimit) { *value = 0; return CUDA_SUCCESS; }
NULLGPU_API CUresult cuCtxSetLimit(CUlimit, size_t) { return CUDA_SUCCESS; }
NULLGPU_API CUresult cuCtxSynchronize() { report(WAIT, "cuCtxSynchronize"); return CUDA_SUCCESS; }
NULLGPU_API CUresult cuStreamSynchronize(CUstream) { report(WAIT, "cuStreamSynchronize"); return CUDA_SUCCESS; }
NULLGPU_API CUresult cuStreamIsCapturing(CUstream, CUstreamCaptureStatus *status) { *status = CU_STREAM_CAPTURE_STATUS_NONE; return CUDA_SUCCESS; }
NULLGPU_API CUresult cuGetErrorString(CUresult error, const char **text) { *text = error ? "refused by the null GPU" : "no error"; return CUDA_SUCCESS; }
NULLGPU_API CUresult cuGetErrorName(CUresult error, const char **text) { *text = error ? "CUDA_ERROR" : "CUDA_SUCCESS"; return CUDA_SUCCESS; }

// ---- modules: a function is its own name
NULLGPU_API CUresult cuModuleLoadData(CUmodule *module, const void *) { *module = static_cast<CUmodule>(handle()); return CUDA_SUCCESS; }
NULLGPU_API CUresult cuModuleLoadDataEx(CUmodule *module, const void *image, unsigned, CUjit_option *, void **) { return cuModuleLoadData(module, image); }
NULLGPU_API CUresult cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }
NULLGPU_API CUresult cuModuleGetFunction(CUfunction *function, CUmodule, const char *name) {
  *function = reinterpret_cast<CUfunction>(strdup(name));  // kept: a launch may come at any time
  return CUDA_SUCCESS;
}
NULLGPU_API CUresult cuFuncGetAttribute(int *value, CUfunction_attribute which, CUfunction) {
  *value = which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : which == CU_FUNC_ATTRIBUTE_NUM_REGS ? 64 : 0;
  return CUDA_SUCCESS;
}
NULLGPU_API CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute, int) { return CUDA_SUCCESS; }
NULLGPU_API CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }
NULLGPU_API CUresult cuOccupancyMaxActiveClusters(int *count, CUfunction, const CUlaunchConfig *) { *count = 1; return CUDA_SUCCESS; }
NULLGPU_API CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *count, CUfunction, int, size_t) { *count = 1; return CUDA_SUCCESS; }
NULLGPU_API CUresult cuTensorMapEncodeTiled(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *, const cuuint64_t *,
                                            const cuuint32_t *, const cuuint32_t *, CUtensorMapInterleave, CUtensorMapSwizzle,
                                            CUtensorMapL2promotion, CUtensorMapFloatOOBfill) { return CUDA_SUCCESS; }
NULLGPU_API CUresult cuLaunchKernel(CUfunction function, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz,
                                    unsigned shared, CUstream, void **, void **) {
  return start(function, x, y, z, static_cast<long>(bx) * by * bz, shared);
}
NULLGPU_API CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction function, void **, void **) {
  const long threads = static_cast<long>(c->blockDimX) * c->blockDimY * c->blockDimZ;
  return start(function, c->gridDimX, c->gridDimY, c->gridDimZ, threads, c->sharedMemBytes);
}
NULLGPU_API CUresult cuLaunchCooperativeKernel(CUfunction function, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by,
                                               unsigned bz, unsigned shared, CUstream, void **) {
  return start(function, x, y, z, static_cast<long>(bx) * by * bz, shared);
}

// ---- memory
NULLGPU_API CUresult cuPointerGetAttribute(void *value, CUpointer_attribute which, CUdeviceptr pointer) {
  const void *at = reinterpret_cast<const void *>(pointer);
  if (!on_device(at) && !pinned(at)) return CUDA_ERROR_INVALID_VALUE;
  if (which == CU_POINTER_ATTRIBUTE_DEVICE_POINTER) *static_cast<CUdeviceptr *>(value) = pointer;
  else *static_cast<int *>(value) = on_device(at) ? CU_MEMORYTYPE_DEVICE : CU_MEMORYTYPE_HOST;
  return CUDA_SUCCESS;
}
NULLGPU_API CUresult cuMemsetD32Async(CUdeviceptr, unsigned, size_t words, CUstream) { report(SET, "cuMemsetD32Async", static_cast<long>(4 * words)); return CUDA_SUCCESS; }
NULLGPU_API CUresult cuMemGetAllocationGranularity(size_t *bytes, const CUmemAllocationProp *, CUmemAllocationGranularity_flags) { *bytes = 2 << 20; return CUDA_SUCCESS; }
NULLGPU_API CUresult cuMemAddressReserve(CUdeviceptr *pointer, size_t bytes, size_t, CUdeviceptr, unsigned long long) {
  void *start = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (start == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
  *pointer = reinterpret_cast<CUdeviceptr>(start);
  return CUDA_SUCCESS;
}
NULLGPU_API CUresult cuMemAddressFree(CUdeviceptr pointer, size_t bytes) { munmap(reinterpret_cast<void *>(pointer), bytes); return CUDA_SUCCESS; }
NULLGPU_API CUresult cuMemCreate(CUmemGenericAllocationHandle *made, size_t bytes, const CUmemAllocationProp *, unsigned long long) {
  if (!take(bytes)) return CUDA_ERROR_OUT_OF_MEMORY;
  *made = reinterpret_cast<CUmemGenericAllocationHandle>(new Physical{bytes});
  return CUDA_SUCCESS;
}
NULLGPU_API CUresult cuMemRelease(CUmemGenericAllocationHandle made) {
  auto *physical = reinterpret_cast<Physical *>(made);
  give(physical->bytes);
  delete physical;
  return CUDA_SUCCESS;
}
NULLGPU_API CUresult cuMemMap(CUdeviceptr pointer, size_t bytes, size_t, CUmemGenericAllocationHandle, unsigned long long) {
  map_device(reinterpret_cast<void *>(pointer), bytes);
  return CUDA_SUCCESS;
}
NULLGPU_API CUresult cuMemUnmap(CUdeviceptr pointer, size_t) { unmap_device(reinterpret_cast<void *>(pointer)); return CUDA_SUCCESS; }
NULLGPU_API CUresult cuMemSetAccess(CUdeviceptr, size_t, const CUmemAccessDesc *, size_t) { return CUDA_SUCCESS; }

NULLGPU_API CUresult cuGetProcAddress(const char *name, void **function, int, cuuint64_t, CUdriverProcAddressQueryResult *status) {
  *function = lookup(name);
  if (status) *status = CU_GET_PROC_ADDRESS_SUCCESS;
  return CUDA_SUCCESS;
}
}
