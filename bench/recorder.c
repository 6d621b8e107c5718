/* A libcuda.so.1 without a GPU: the driver of Triton loads its kernels here and launches them, and
   a launch only writes down what it was given. */

#include <cuda.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { PARAMETERS = 64, WORDS = 128, LAUNCHES = 256 };

/* As LAUNCH in recorder.py. */
struct launch {
  uint64_t function;
  uint32_t grid[3], threads[3], shared, parameters;
  uint64_t values[WORDS]; /* each from a new word on, filled up with zeros */
};

struct function {
  uint32_t parameters;
  uint32_t bytes[PARAMETERS];
};

struct launch launches[LAUNCHES];
int launched = 0, recording = 0;

/* The parameters of a loaded kernel, from its binary. */
void declare(struct function *function, uint32_t parameters, const uint32_t *bytes) {
  function->parameters = parameters;
  memcpy(function->bytes, bytes, parameters * sizeof(*bytes));
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **values, void **extra) {
  const struct function *function = (const struct function *)f;
  (void)extra;
  if (!recording)
    return CUDA_SUCCESS;
  if (launched == LAUNCHES)
    return CUDA_ERROR_OUT_OF_MEMORY;
  struct launch made = {
      .function = (uint64_t)(uintptr_t)f,
      .grid = {c->gridDimX, c->gridDimY, c->gridDimZ},
      .threads = {c->blockDimX, c->blockDimY, c->blockDimZ},
      .shared = c->sharedMemBytes,
      .parameters = function->parameters,
  };
  for (uint32_t i = 0, word = 0; i < function->parameters; i++) {
    uint32_t words = (function->bytes[i] + 7) / 8;
    if (word + words > WORDS)
      return CUDA_ERROR_OUT_OF_MEMORY;
    memcpy(&made.values[word], values[i], function->bytes[i]);
    word += words;
  }
  launches[launched++] = made;
  return CUDA_SUCCESS;
}

/* A descriptor of a matrix has here what a GPU needs to know, in words. */
CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank,
                                void *address, const cuuint64_t *sizes, const cuuint64_t *strides,
                                const cuuint32_t *box, const cuuint32_t *steps,
                                CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  if (rank != 2)
    return CUDA_ERROR_INVALID_VALUE;
  const uint64_t words[] = {(uintptr_t)address, sizes[0],   sizes[1], strides[0], box[0],
                            box[1],             steps[0],   steps[1], type,       interleave,
                            swizzle,            promotion, fill};
  memset(map, 0, sizeof(*map));
  memcpy(map, words, sizeof(words));
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  (void)module, (void)name;
  *function = calloc(1, sizeof(struct function));
  return *function ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  (void)device;
  *value = 32;
  if (attribute == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)
    *value = 232448; /* of an H100 */
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  (void)function;
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  (void)attribute;
  memcpy(data, &pointer, sizeof(pointer));
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *context) {
  *context = (CUcontext)1;
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = error == CUDA_ERROR_OUT_OF_MEMORY ? "too many launches to record" : "not recorded";
  return CUDA_SUCCESS;
}

CUresult cuDriverGetVersion(int *version) {
  *version = CUDA_VERSION;
  return CUDA_SUCCESS;
}

#define DONE(name, ...)                                                                            \
  CUresult name(__VA_ARGS__) { return CUDA_SUCCESS; }
DONE(cuDeviceGet, CUdevice *device, int ordinal)
DONE(cuModuleLoadData, CUmodule *module, const void *image)
DONE(cuFuncSetAttribute, CUfunction function, CUfunction_attribute attribute, int value)
DONE(cuFuncSetCacheConfig, CUfunction function, CUfunc_cache config)
DONE(cuCtxSetCurrent, CUcontext context)
DONE(cuDevicePrimaryCtxRetain, CUcontext *context, CUdevice device)
DONE(cuCtxGetLimit, size_t *value, CUlimit limit)
DONE(cuCtxSetLimit, CUlimit limit, size_t value)
