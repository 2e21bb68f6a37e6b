// libcudart of the rehearsal: a CUDA runtime that computes nothing.
//
// It lets the CUDA provider of onnxruntime-gpu start on a machine without a GPU, so that placement, bindings, graph
// capture and the host's side of a step can be rehearsed. Memory is the host's, copies are copies, kernels do not run:
// what comes out of a graph means nothing.
//
// What is asked of the device is counted. `rehearsal_counts` gives the numbers at any time; with IMSM_REHEARSAL_COUNTS
// set to a path, one line of JSON is appended there when the process ends.
#include <cuda_runtime_api.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define API __attribute__((visibility("default")))
#define ALIGNMENT 256

// -- Counting

#define COUNTERS(each)                                                                                              \
  each(kernels) each(captured_kernels) each(graph_launches) each(copies_to_device) each(bytes_to_device)            \
      each(copies_to_host) each(bytes_to_host) each(copies_on_device) each(bytes_on_device) each(copies_undirected) \
          each(bytes_undirected) each(copies_during_capture) each(device_allocations) each(device_bytes)            \
              each(host_allocations) each(host_bytes) each(synchronizations)

#define DECLARE(name) static atomic_long name;
COUNTERS(DECLARE)

static _Thread_local int capturing;

// A JSON object of the counters since the start or the last `rehearsal_reset`; returns its length, as snprintf does.
API int rehearsal_counts(char* json, size_t size) {
  int length = 0;
#define WRITE(name)                                                                                                  \
  length += snprintf(json + ((size_t)length < size ? (size_t)length : size),                                         \
                     (size_t)length < size ? size - (size_t)length : 0, "%s\"%s\": %ld", length ? ", " : "{", #name, \
                     atomic_load(&name));
  COUNTERS(WRITE)
  length += snprintf(json + ((size_t)length < size ? (size_t)length : size),
                     (size_t)length < size ? size - (size_t)length : 0, "}");
  return length;
}

API void rehearsal_reset(void) {
#define RESET(name) atomic_store(&name, 0);
  COUNTERS(RESET)
}

// Products of cuBLAS are launches too; its stubs call this.
API void rehearsal_launch(void) { atomic_fetch_add(capturing ? &captured_kernels : &kernels, 1); }

__attribute__((destructor)) static void append_counts(void) {
  const char* path = getenv("IMSM_REHEARSAL_COUNTS");
  FILE* file = path != NULL ? fopen(path, "a") : NULL;
  if (file == NULL) return;
  char json[2048];
  rehearsal_counts(json, sizeof json);
  fprintf(file, "%s\n", json);
  fclose(file);
}

static cudaError_t launched(void) {
  rehearsal_launch();
  return cudaSuccess;
}

static void count_copy(size_t bytes, enum cudaMemcpyKind kind) {
  if (capturing) atomic_fetch_add(&copies_during_capture, 1);
  switch (kind) {
    case cudaMemcpyHostToDevice:
      atomic_fetch_add(&copies_to_device, 1);
      atomic_fetch_add(&bytes_to_device, (long)bytes);
      break;
    case cudaMemcpyDeviceToHost:
      atomic_fetch_add(&copies_to_host, 1);
      atomic_fetch_add(&bytes_to_host, (long)bytes);
      break;
    case cudaMemcpyDeviceToDevice:
      atomic_fetch_add(&copies_on_device, 1);
      atomic_fetch_add(&bytes_on_device, (long)bytes);
      break;
    default:
      atomic_fetch_add(&copies_undirected, 1);
      atomic_fetch_add(&bytes_undirected, (long)bytes);
  }
}

// -- Memory

// Zeros, aligned as CUDA aligns; large blocks take pages only where they are written. The block's own address stands in
// front of it.
static void* zeros(size_t size) {
  char* block = calloc(1, size + 2 * ALIGNMENT);
  if (block == NULL) return NULL;
  char* start = block + ALIGNMENT + (ALIGNMENT - (uintptr_t)block % ALIGNMENT) % ALIGNMENT;
  ((void**)start)[-1] = block;
  return start;
}

static cudaError_t release(void* memory) {
  if (memory != NULL) free(((void**)memory)[-1]);
  return cudaSuccess;
}

static cudaError_t allocate(void** memory, size_t size, atomic_long* count, atomic_long* bytes) {
  *memory = zeros(size);
  if (*memory == NULL) return cudaErrorMemoryAllocation;
  atomic_fetch_add(count, 1);
  atomic_fetch_add(bytes, (long)size);
  return cudaSuccess;
}

API cudaError_t cudaMalloc(void** memory, size_t size) {
  return allocate(memory, size, &device_allocations, &device_bytes);
}
API cudaError_t cudaMallocFromPoolAsync(void** memory, size_t size, cudaMemPool_t pool, cudaStream_t stream) {
  return cudaMalloc(memory, size);
}
API cudaError_t cudaHostAlloc(void** memory, size_t size, unsigned flags) {
  return allocate(memory, size, &host_allocations, &host_bytes);
}
API cudaError_t cudaMallocHost(void** memory, size_t size) { return cudaHostAlloc(memory, size, 0); }
API cudaError_t cudaFree(void* memory) { return release(memory); }
API cudaError_t cudaFreeAsync(void* memory, cudaStream_t stream) { return release(memory); }
API cudaError_t cudaFreeHost(void* memory) { return release(memory); }
API cudaError_t cudaMemGetInfo(size_t* available, size_t* total) {
  *available = 60ull << 30;
  *total = 80ull << 30;
  return cudaSuccess;
}

API cudaError_t cudaMemcpy(void* to, const void* from, size_t size, enum cudaMemcpyKind kind) {
  count_copy(size, kind);
  memmove(to, from, size);
  return cudaSuccess;
}
API cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, enum cudaMemcpyKind kind,
                                cudaStream_t stream) {
  return cudaMemcpy(to, from, size, kind);
}
API cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                                  size_t height, enum cudaMemcpyKind kind, cudaStream_t stream) {
  count_copy(width * height, kind);
  for (size_t row = 0; row < height; row++)
    memmove((char*)to + row * to_pitch, (const char*)from + row * from_pitch, width);
  return cudaSuccess;
}
API cudaError_t cudaMemcpyFromSymbol(void* to, const void* symbol, size_t size, size_t offset,
                                     enum cudaMemcpyKind kind) {
  count_copy(size, kind);
  memset(to, 0, size);  // a symbol is in the device's code, which does not run
  return cudaSuccess;
}
API cudaError_t cudaMemset(void* memory, int value, size_t size) {
  memset(memory, value, size);
  return cudaSuccess;
}
API cudaError_t cudaMemsetAsync(void* memory, int value, size_t size, cudaStream_t stream) {
  return cudaMemset(memory, value, size);
}
API cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes* attributes, const void* pointer) {
  memset(attributes, 0, sizeof *attributes);
  attributes->type = cudaMemoryTypeDevice;
  attributes->devicePointer = (void*)pointer;
  return cudaSuccess;
}

// What a handle points to is never read.
#define NEW_HANDLE(handle) (*(handle) = zeros(1), *(handle) == NULL ? cudaErrorMemoryAllocation : cudaSuccess)

API cudaError_t cudaMemPoolCreate(cudaMemPool_t* pool, const struct cudaMemPoolProps* properties) {
  return NEW_HANDLE(pool);
}
API cudaError_t cudaMemPoolDestroy(cudaMemPool_t pool) { return release(pool); }
API cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t pool, enum cudaMemPoolAttr attribute, void* value) {
  memset(value, 0, sizeof(uint64_t));
  return cudaSuccess;
}
API cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t pool, enum cudaMemPoolAttr attribute, void* value) {
  return cudaSuccess;
}
API cudaError_t cudaMemPoolTrimTo(cudaMemPool_t pool, size_t size) { return cudaSuccess; }

// -- The device: one, with the limits of an H100

static int device;

API cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
API cudaError_t cudaGetDevice(int* current) {
  *current = device;
  return cudaSuccess;
}
API cudaError_t cudaSetDevice(int wanted) {
  device = wanted;
  return cudaSuccess;
}
API cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
API cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
API cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp* properties, int of) {
  *properties = (struct cudaDeviceProp){
      .name = "no GPU (rehearsal)",
      .major = 9,
      .minor = 0,
      .multiProcessorCount = 132,
      .maxThreadsPerBlock = 1024,
      .maxThreadsPerMultiProcessor = 2048,
      .maxThreadsDim = {1024, 1024, 64},
      .maxGridSize = {2147483647, 65535, 65535},
      .sharedMemPerBlock = 49152,
      .sharedMemPerBlockOptin = 232448,
      .sharedMemPerMultiprocessor = 233472,
      .regsPerBlock = 65536,
      .regsPerMultiprocessor = 65536,
      .warpSize = 32,
      .totalGlobalMem = 80ull << 30,
      .l2CacheSize = 50 << 20,
  };
  return cudaSuccess;
}
API cudaError_t cudaDeviceGetAttribute(int* value, enum cudaDeviceAttr attribute, int of) {
  struct cudaDeviceProp properties;
  cudaGetDeviceProperties(&properties, of);
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = properties.major;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = properties.minor;
      break;
    case cudaDevAttrMultiProcessorCount:
      *value = properties.multiProcessorCount;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = (int)properties.sharedMemPerBlock;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = (int)properties.sharedMemPerBlockOptin;
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = (int)properties.sharedMemPerMultiprocessor;
      break;
    case cudaDevAttrMaxThreadsPerBlock:
      *value = properties.maxThreadsPerBlock;
      break;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = properties.maxThreadsPerMultiProcessor;
      break;
    case cudaDevAttrMaxRegistersPerMultiprocessor:
      *value = properties.regsPerMultiprocessor;
      break;
    case cudaDevAttrWarpSize:
      *value = properties.warpSize;
      break;
    default:
      *value = 1;  // the others that are asked for say whether the device can do something
  }
  return cudaSuccess;
}
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* kernel, int threads,
                                                                       size_t shared, unsigned flags) {
  *blocks = 2;
  return cudaSuccess;
}

// -- Streams and events: everything is done at once

API cudaError_t cudaStreamCreate(cudaStream_t* stream) { return NEW_HANDLE(stream); }
API cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) { return NEW_HANDLE(stream); }
API cudaError_t cudaStreamDestroy(cudaStream_t stream) { return release(stream); }
API cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) { return cudaSuccess; }
API cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  atomic_fetch_add(&synchronizations, 1);
  return cudaSuccess;
}
API cudaError_t cudaStreamQuery(cudaStream_t stream) { return cudaSuccess; }
API cudaError_t cudaEventQuery(cudaEvent_t event) { return cudaSuccess; }
API cudaError_t cudaDeviceSynchronize(void) { return cudaStreamSynchronize(NULL); }
API cudaError_t cudaEventCreate(cudaEvent_t* event) { return NEW_HANDLE(event); }
API cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) { return NEW_HANDLE(event); }
API cudaError_t cudaEventDestroy(cudaEvent_t event) { return release(event); }
API cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) { return cudaSuccess; }
API cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) { return cudaSuccess; }
API cudaError_t cudaEventSynchronize(cudaEvent_t event) { return cudaStreamSynchronize(NULL); }
API cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
  *milliseconds = 1e-3f;
  return cudaSuccess;
}

// -- CUDA graphs: a capture notes nothing, a launch does nothing

API cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
  capturing = 1;
  return cudaSuccess;
}
API cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  capturing = 0;
  return NEW_HANDLE(graph);
}
API cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus* status) {
  *status = capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
API cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long flags) {
  return NEW_HANDLE(executable);
}
API cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  atomic_fetch_add(&graph_launches, 1);
  return cudaSuccess;
}
API cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return release(graph); }
API cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) { return release(executable); }

// -- Kernels

API cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                                 cudaStream_t stream) {
  return launched();
}
API cudaError_t cudaLaunchCooperativeKernel(const void* kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                                            cudaStream_t stream) {
  return launched();
}
API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* settings, const void* kernel, void** arguments) {
  return launched();
}
API cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* argument) {
  function(argument);
  return cudaSuccess;
}
API cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes* attributes, const void* kernel) {
  *attributes = (struct cudaFuncAttributes){.maxThreadsPerBlock = 1024, .binaryVersion = 90, .ptxVersion = 90};
  return cudaSuccess;
}
API cudaError_t cudaFuncSetAttribute(const void* kernel, enum cudaFuncAttribute attribute, int value) {
  return cudaSuccess;
}
API cudaError_t cudaLibraryLoadData(cudaLibrary_t* library, const void* code, enum cudaJitOption* options,
                                    void** values, unsigned count, enum cudaLibraryOption* library_options,
                                    void** library_values, unsigned library_count) {
  return NEW_HANDLE(library);
}
API cudaError_t cudaLibraryUnload(cudaLibrary_t library) { return release(library); }
API cudaError_t cudaLibraryGetKernel(cudaKernel_t* kernel, cudaLibrary_t library, const char* name) {
  *kernel = (cudaKernel_t)library;
  return cudaSuccess;
}
API cudaError_t cudaKernelSetAttributeForDevice(cudaKernel_t kernel, enum cudaFuncAttribute attribute, int value,
                                                int of) {
  return cudaSuccess;
}
API cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned version,
                                                 unsigned long long flags,
                                                 enum cudaDriverEntryPointQueryResult* result) {
  *function = NULL;
  if (result != NULL) *result = cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

// What the host code that nvcc writes calls: at loading, and around each launch.
API void** __cudaRegisterFatBinary(void* code) {
  static void* handle;
  return &handle;
}
API void __cudaRegisterFatBinaryEnd(void** handle) {}
API void __cudaUnregisterFatBinary(void** handle) {}
API void __cudaRegisterFunction(void** handle, const char* host, char* on_device, const char* name, int limit,
                                void* thread, void* block, void* block_size, void* grid_size, int* warp) {}
API void __cudaRegisterVar(void** handle, char* host, char* address, const char* name, int external, size_t size,
                           int constant, int global) {}
API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) { return 0; }
API cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = *block = (dim3){1, 1, 1};
  *shared = 0;
  *(void**)stream = NULL;
  return cudaSuccess;
}
API cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = (cudaKernel_t)host;
  return cudaSuccess;
}
API cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                                   cudaStream_t stream) {
  return launched();
}

// -- Errors: there are none but a failed allocation

API const char* cudaGetErrorName(cudaError_t error) { return error == cudaSuccess ? "success" : "error"; }
API const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "out of memory"; }
API cudaError_t cudaGetLastError(void) { return cudaSuccess; }
API cudaError_t cudaPeekAtLastError(void) { return cudaSuccess; }
