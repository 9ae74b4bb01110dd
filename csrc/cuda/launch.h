// The few things in kernels.cu that differ between nvcc and the tests' emulation on a CPU (tests/cuda/emulation.h).
#pragma once

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace sparsekit::cuda {

using Half = __half;
using BFloat16 = __nv_bfloat16;

// A block's dynamic shared memory.
__device__ inline float* shared_floats() {
  extern __shared__ float4 memory[];
  return reinterpret_cast<float*>(memory);
}

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int shared_bytes, void* stream,
           Arguments... arguments) {
  if (shared_bytes > 48 << 10) {
    const int error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error) return error;
  }
  kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
  return cudaGetLastError();
}

}  // namespace sparsekit::cuda
#else
#include "emulation.h"
#endif
