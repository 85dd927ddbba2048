// cuBLAS and NCCL. GEMMs are checked for leading dimensions that cuBLAS refuses; collectives move nothing.
// cuBLAS's headers include these, which need a package of C++ headers that torch's wheels lack; only names are used here.
#define __CUDA_FP16_H__
#define __CUDA_BF16_H__
#define __CUDA_FP8_H__
struct __half;
struct __nv_bfloat16;
#include <cublasLt.h>
#include <cublas_v2.h>
#include <nccl.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "nullgpu.h"

using namespace nullgpu;

namespace {
cublasStatus_t gemm(const char *name, cublasOperation_t ta, cublasOperation_t tb, long m, long n, long k, long lda, long ldb, long ldc,
                    long batch = 1) {
  const auto least = [](long rows) { return rows > 1 ? rows : 1; };
  const bool possible = lda >= least(ta == CUBLAS_OP_N ? m : k) && ldb >= least(tb == CUBLAS_OP_N ? k : n) && ldc >= least(m);
  report(possible ? GEMM : BAD, name, m, n, k, possible ? batch : lda);
  return possible ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_INVALID_VALUE;
}
const char *type_name(int type) {  // a cudaDataType
  switch (type) {
    case CUDA_R_32F: return "fp32";
    case CUDA_R_16F: return "fp16";
    case CUDA_R_16BF: return "bf16";
    case CUDA_R_8F_E4M3: return "e4m3";
    case CUDA_R_8F_E5M2: return "e5m2";
    default: return "other";
  }
}
struct Layout {  // what the stub keeps in a cublasLtMatrixLayout_t
  int type;
  uint64_t rows, columns;
};
ncclResult_t communicator(ncclComm_t *made) {
  *made = static_cast<ncclComm_t>(handle());
  return ncclSuccess;
}
ncclResult_t moved(const char *name, size_t count, ncclDataType_t type) {
  report(COLLECTIVE, name, static_cast<long>(count), type);
  return ncclSuccess;
}
}  // namespace

extern "C" {
#define BLAS NULLGPU_API cublasStatus_t
#define OPS cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k
BLAS cublasCreate_v2(cublasHandle_t *made) { *made = static_cast<cublasHandle_t>(handle()); return CUBLAS_STATUS_SUCCESS; }
BLAS cublasGetMathMode(cublasHandle_t, cublasMath_t *mode) { *mode = CUBLAS_DEFAULT_MATH; return CUBLAS_STATUS_SUCCESS; }
BLAS cublasGetPointerMode_v2(cublasHandle_t, cublasPointerMode_t *mode) { *mode = CUBLAS_POINTER_MODE_HOST; return CUBLAS_STATUS_SUCCESS; }
BLAS cublasGemmEx(cublasHandle_t, OPS, const void *, const void *, cudaDataType at, int lda, const void *, cudaDataType bt, int ldb,
                  const void *, void *, cudaDataType ct, int ldc, cublasComputeType_t, cublasGemmAlgo_t) {
  char name[48];
  std::snprintf(name, sizeof name, "GemmEx %s x %s to %s", type_name(at), type_name(bt), type_name(ct));
  return gemm(name, ta, tb, m, n, k, lda, ldb, ldc);
}
BLAS cublasSgemm_v2(cublasHandle_t, OPS, const float *, const float *, int lda, const float *, int ldb, const float *, float *, int ldc) {
  return gemm("Sgemm", ta, tb, m, n, k, lda, ldb, ldc);
}
BLAS cublasDgemm_v2(cublasHandle_t, OPS, const double *, const double *, int lda, const double *, int ldb, const double *, double *, int ldc) {
  return gemm("Dgemm", ta, tb, m, n, k, lda, ldb, ldc);
}
BLAS cublasSgemmStridedBatched(cublasHandle_t, OPS, const float *, const float *, int lda, long long, const float *, int ldb, long long,
                               const float *, float *, int ldc, long long, int batch) {
  return gemm("SgemmStridedBatched", ta, tb, m, n, k, lda, ldb, ldc, batch);
}
BLAS cublasGemmStridedBatchedEx(cublasHandle_t, OPS, const void *, const void *, cudaDataType, int lda, long long, const void *, cudaDataType,
                                int ldb, long long, const void *, void *, cudaDataType, int ldc, long long, int batch, cublasComputeType_t,
                                cublasGemmAlgo_t) {
  return gemm("GemmStridedBatchedEx", ta, tb, m, n, k, lda, ldb, ldc, batch);
}
NULLGPU_API size_t cublasLtGetVersion() { return 130000; }
BLAS cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *made, cublasComputeType_t, cudaDataType_t) { *made = static_cast<cublasLtMatmulDesc_t>(handle()); return CUBLAS_STATUS_SUCCESS; }
BLAS cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t made) { std::free(made); return CUBLAS_STATUS_SUCCESS; }
BLAS cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t, cublasLtMatmulDescAttributes_t, const void *, size_t) { return CUBLAS_STATUS_SUCCESS; }
BLAS cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *made) { *made = static_cast<cublasLtMatmulPreference_t>(handle()); return CUBLAS_STATUS_SUCCESS; }
BLAS cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t made) { std::free(made); return CUBLAS_STATUS_SUCCESS; }
BLAS cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t, cublasLtMatmulPreferenceAttributes_t, const void *, size_t) { return CUBLAS_STATUS_SUCCESS; }
BLAS cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *made, cudaDataType type, uint64_t rows, uint64_t columns, int64_t) {
  *made = static_cast<cublasLtMatrixLayout_t>(handle());
  const Layout layout{type, rows, columns};
  std::memcpy(static_cast<void *>(*made), &layout, sizeof layout);
  return CUBLAS_STATUS_SUCCESS;
}
BLAS cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t made) { std::free(made); return CUBLAS_STATUS_SUCCESS; }
BLAS cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t, cublasLtMatrixLayoutAttribute_t, const void *, size_t) { return CUBLAS_STATUS_SUCCESS; }
BLAS cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t, cublasLtMatrixLayout_t, cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
                                    cublasLtMatrixLayout_t, cublasLtMatmulPreference_t, int, cublasLtMatmulHeuristicResult_t *, int *found) {
  *found = 1;
  return CUBLAS_STATUS_SUCCESS;
}
BLAS cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t, const void *, const void *, cublasLtMatrixLayout_t a, const void *, cublasLtMatrixLayout_t b,
                    const void *, const void *, cublasLtMatrixLayout_t, void *, cublasLtMatrixLayout_t d, const cublasLtMatmulAlgo_t *, void *,
                    size_t, cudaStream_t) {
  Layout first, second, out;
  std::memcpy(&first, a, sizeof first);
  std::memcpy(&second, b, sizeof second);
  std::memcpy(&out, d, sizeof out);
  char name[48];
  std::snprintf(name, sizeof name, "LtMatmul %s x %s to %s", type_name(first.type), type_name(second.type), type_name(out.type));
  const uint64_t inner = first.rows == out.rows ? first.columns : first.rows;
  report(GEMM, name, static_cast<long>(out.rows), static_cast<long>(out.columns), static_cast<long>(inner), 1);
  return CUBLAS_STATUS_SUCCESS;
}

// ---- NCCL
#define NCCL NULLGPU_API ncclResult_t
NCCL ncclGetVersion(int *version) { *version = NCCL_VERSION_CODE; return ncclSuccess; }
NCCL ncclGetUniqueId(ncclUniqueId *id) { std::memset(id, 7, sizeof *id); return ncclSuccess; }
NULLGPU_API const char *ncclGetErrorString(ncclResult_t) { return "no error"; }
NULLGPU_API const char *ncclGetLastError(ncclComm_t) { return ""; }
NCCL ncclCommInitRank(ncclComm_t *made, int, ncclUniqueId, int) { return communicator(made); }
NCCL ncclCommInitRankConfig(ncclComm_t *made, int, ncclUniqueId, int, ncclConfig_t *) { return communicator(made); }
NCCL ncclCommInitRankScalable(ncclComm_t *made, int, int, int, ncclUniqueId *, ncclConfig_t *) { return communicator(made); }
NCCL ncclCommSplit(ncclComm_t, int, int, ncclComm_t *made, ncclConfig_t *) { return communicator(made); }
NCCL ncclCommGetAsyncError(ncclComm_t, ncclResult_t *error) { *error = ncclSuccess; return ncclSuccess; }
NCCL ncclCommCount(const ncclComm_t, int *count) { *count = 1; return ncclSuccess; }
NCCL ncclCommUserRank(const ncclComm_t, int *rank) { *rank = 0; return ncclSuccess; }
NCCL ncclMemAlloc(void **pointer, size_t bytes) { return allocate(pointer, bytes) ? ncclSuccess : ncclSystemError; }
NCCL ncclMemFree(void *pointer) { release(pointer); return ncclSuccess; }
NCCL ncclAllReduce(const void *, void *, size_t n, ncclDataType_t type, ncclRedOp_t, ncclComm_t, cudaStream_t) { return moved("AllReduce", n, type); }
NCCL ncclAllGather(const void *, void *, size_t n, ncclDataType_t type, ncclComm_t, cudaStream_t) { return moved("AllGather", n, type); }
NCCL ncclReduceScatter(const void *, void *, size_t n, ncclDataType_t type, ncclRedOp_t, ncclComm_t, cudaStream_t) { return moved("ReduceScatter", n, type); }
NCCL ncclBroadcast(const void *, void *, size_t n, ncclDataType_t type, int, ncclComm_t, cudaStream_t) { return moved("Broadcast", n, type); }
NCCL ncclBcast(void *, size_t n, ncclDataType_t type, int, ncclComm_t, cudaStream_t) { return moved("Broadcast", n, type); }
NCCL ncclReduce(const void *, void *, size_t n, ncclDataType_t type, ncclRedOp_t, int, ncclComm_t, cudaStream_t) { return moved("Reduce", n, type); }
NCCL ncclSend(const void *, size_t n, ncclDataType_t type, int, ncclComm_t, cudaStream_t) { return moved("Send", n, type); }
NCCL ncclRecv(void *, size_t n, ncclDataType_t type, int, ncclComm_t, cudaStream_t) { return moved("Recv", n, type); }
}
