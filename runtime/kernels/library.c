// The library that onnxruntime loads: the operators of domain "imsm", for processors that have what they need.
//
// A graph's own functions say what these operators compute; where they are not registered, onnxruntime runs those.
#include <pthread.h>
#include <stdlib.h>

#include "kernels.h"

static const OrtApi* ort;

OrtStatus* failure(const char* message) { return ort->CreateStatus(ORT_RUNTIME_EXCEPTION, message); }

OrtStatus* parallel_for(const OrtKernelContext* context, Task task, size_t total, void* arguments) {
  return ort->KernelContext_ParallelFor(context, task, total, 0, arguments);
}

enum { MOST_DIMENSIONS = 8 };

// The shape of a tensor; returns how many dimensions it has, `count` gets the number of elements.
static size_t shape_of(const OrtValue* value, int64_t shape[MOST_DIMENSIONS], size_t* count) {
  OrtTensorTypeAndShapeInfo* info = NULL;
  size_t dimensions = 0;
  ort->ReleaseStatus(ort->GetTensorTypeAndShape(value, &info));
  ort->ReleaseStatus(ort->GetDimensionsCount(info, &dimensions));
  if (dimensions > MOST_DIMENSIONS) dimensions = MOST_DIMENSIONS;
  ort->ReleaseStatus(ort->GetDimensions(info, shape, dimensions));
  ort->ReleaseStatus(ort->GetTensorShapeElementCount(info, count));
  ort->ReleaseTensorTypeAndShapeInfo(info);
  return dimensions;
}

const void* input(const OrtKernelContext* context, size_t index, size_t* count, size_t* last) {
  const OrtValue* value = NULL;
  size_t inputs = 0;
  ort->ReleaseStatus(ort->KernelContext_GetInputCount(context, &inputs));
  if (index >= inputs) return NULL;
  ort->ReleaseStatus(ort->KernelContext_GetInput(context, index, &value));
  if (value == NULL) return NULL;
  int64_t shape[MOST_DIMENSIONS];
  size_t elements = 0;
  void* data = NULL;
  const size_t dimensions = shape_of(value, shape, &elements);
  if (last) *last = dimensions ? (size_t)shape[dimensions - 1] : 1;
  if (count) *count = elements;
  ort->ReleaseStatus(ort->GetTensorMutableData((OrtValue*)value, &data));
  return data;
}

int is_half(const OrtKernelContext* context, size_t index) {
  const OrtValue* value = NULL;
  ort->ReleaseStatus(ort->KernelContext_GetInput(context, index, &value));
  OrtTensorTypeAndShapeInfo* info = NULL;
  ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  ort->ReleaseStatus(ort->GetTensorTypeAndShape(value, &info));
  ort->ReleaseStatus(ort->GetTensorElementType(info, &type));
  ort->ReleaseTensorTypeAndShapeInfo(info);
  return type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
}

float* output(OrtKernelContext* context, size_t index, const int64_t* shape, size_t dimensions) {
  OrtValue* made = NULL;
  void* data = NULL;
  ort->ReleaseStatus(ort->KernelContext_GetOutput(context, index, shape, dimensions, &made));
  ort->ReleaseStatus(ort->GetTensorMutableData(made, &data));
  return data;
}

float* output_like(OrtKernelContext* context, size_t index, size_t model, int64_t last) {
  const OrtValue* value = NULL;
  ort->ReleaseStatus(ort->KernelContext_GetInput(context, model, &value));
  int64_t shape[MOST_DIMENSIONS];
  size_t elements = 0;
  const size_t dimensions = shape_of(value, shape, &elements);
  if (dimensions) shape[dimensions - 1] = last;
  return output(context, index, shape, dimensions);
}

int64_t attribute(const OrtKernelInfo* info, const char* name, int64_t otherwise) {
  int64_t found = otherwise;
  OrtStatus* status = ort->KernelInfoGetAttribute_int64(info, name, &found);
  if (status != NULL) {
    ort->ReleaseStatus(status);
    return otherwise;
  }
  return found;
}

float float_attribute(const OrtKernelInfo* info, const char* name, float otherwise) {
  float found = otherwise;
  OrtStatus* status = ort->KernelInfoGetAttribute_float(info, name, &found);
  if (status != NULL) {
    ort->ReleaseStatus(status);
    return otherwise;
  }
  return found;
}

const char* cpu_provider(const OrtCustomOp* op) { return (void)op, NULL; }
OrtMemType default_memory(const OrtCustomOp* op, size_t index) { return (void)op, (void)index, OrtMemTypeDefault; }
ONNXTensorElementDataType float_output(const OrtCustomOp* op, size_t index) {
  return (void)op, (void)index, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
}
OrtCustomOpInputOutputCharacteristic required(const OrtCustomOp* op, size_t index) {
  return (void)op, (void)index, INPUT_OUTPUT_REQUIRED;
}
int first_version(const OrtCustomOp* op) { return (void)op, 1; }
int last_version(const OrtCustomOp* op) { return (void)op, INT32_MAX; }

// Whether there are kernels for this processor.
__attribute__((visibility("default"))) int imsm_kernels_supported(void) {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("f16c");
}

__attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                                    const OrtApiBase* base) {
  ort = base->GetApi(ORT_API_VERSION);
  if (ort == NULL || !imsm_kernels_supported()) return NULL;
  static OrtCustomOpDomain* domain;  // lives as long as the process: sessions share it
  static pthread_mutex_t first = PTHREAD_MUTEX_INITIALIZER;
  pthread_mutex_lock(&first);
  OrtStatus* status = NULL;
  if (domain == NULL) {
    status = ort->CreateCustomOpDomain("imsm", &domain);
    if (status == NULL) status = ort->CustomOpDomain_Add(domain, quantized_matmul());
    if (status == NULL) status = ort->CustomOpDomain_Add(domain, quantized_matmul_low_rank());
    if (status == NULL) status = ort->CustomOpDomain_Add(domain, quantized_swiglu());
    if (status == NULL) status = ort->CustomOpDomain_Add(domain, quantized_swiglu_low_rank());
    if (status == NULL) status = ort->CustomOpDomain_Add(domain, group_query_attention());
  }
  pthread_mutex_unlock(&first);
  return status != NULL ? status : ort->AddCustomOpDomain(options, domain);
}
