// What a kernel reads and writes: inputs, outputs, attributes, memory and failures, by onnxruntime's C interface.
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>

#include "kernels.h"

static const OrtApi* ort;
static _Atomic(OrtStatus*) reserve;

void imsm_use(const OrtApi* api) { ort = api; }

OrtStatus* imsm_failure(const char* format, ...) {
  char message[512];
  va_list values;
  va_start(values, format);
  vsnprintf(message, sizeof message, format, values);
  va_end(values);
  OrtStatus* status = ort->CreateStatus(ORT_RUNTIME_EXCEPTION, message);
  if (status == NULL) status = atomic_exchange(&reserve, NULL);
  if (status == NULL) abort();  // NULL would say that all went well
  return status;
}

void imsm_reserve_failure(void) {
  if (atomic_load(&reserve)) return;
  OrtStatus* made = ort->CreateStatus(ORT_RUNTIME_EXCEPTION, "out of memory");
  OrtStatus* none = NULL;
  if (made && !atomic_compare_exchange_strong(&reserve, &none, made)) ort->ReleaseStatus(made);
}

static OrtStatus* describe(const OrtTensorTypeAndShapeInfo* info, ImsmTensor* tensor) {
  int64_t shape[IMSM_MOST_DIMENSIONS];
  IMSM_TRY(ort->GetTensorElementType(info, &tensor->type));
  IMSM_TRY(ort->GetDimensionsCount(info, &tensor->dimensions));
  if (tensor->dimensions > IMSM_MOST_DIMENSIONS) return NULL;
  IMSM_TRY(ort->GetDimensions(info, shape, tensor->dimensions));
  tensor->count = 1;
  for (size_t d = 0; d < tensor->dimensions; d++) {
    tensor->shape[d] = (size_t)shape[d];
    tensor->count = imsm_times(tensor->count, tensor->shape[d]);
  }
  return NULL;
}

OrtStatus* imsm_find_input(const OrtKernelContext* context, size_t index, ImsmTensor* input) {
  *input = (ImsmTensor){0};
  size_t inputs = 0;
  IMSM_TRY(ort->KernelContext_GetInputCount(context, &inputs));
  if (index >= inputs) return NULL;
  const OrtValue* value = NULL;
  IMSM_TRY(ort->KernelContext_GetInput(context, index, &value));
  if (value == NULL) return NULL;
  OrtTensorTypeAndShapeInfo* info = NULL;
  IMSM_TRY(ort->GetTensorTypeAndShape(value, &info));
  OrtStatus* status = describe(info, input);
  ort->ReleaseTensorTypeAndShapeInfo(info);
  IMSM_TRY(status);
  void* data = NULL;
  IMSM_TRY(ort->GetTensorMutableData((OrtValue*)value, &data));
  input->data = data;
  input->given = 1;
  return NULL;
}

OrtStatus* imsm_output(OrtKernelContext* context, size_t index, const size_t* shape, size_t dimensions,
                       float** values) {
  int64_t wanted[IMSM_MOST_DIMENSIONS];
  for (size_t d = 0; d < dimensions; d++) wanted[d] = (int64_t)shape[d];
  OrtValue* made = NULL;
  void* data = NULL;
  IMSM_TRY(ort->KernelContext_GetOutput(context, index, wanted, dimensions, &made));
  if (made == NULL) return imsm_failure("output %zu is missing", index);
  IMSM_TRY(ort->GetTensorMutableData(made, &data));
  *values = data;
  return NULL;
}

static OrtStatus* declared_type(const OrtKernelInfo* info, size_t index, ONNXTensorElementDataType* type) {
  OrtTypeInfo* declared = NULL;
  OrtStatus* status = ort->KernelInfo_GetInputTypeInfo(info, index, &declared);
  if (status && ort->GetErrorCode(status) == ORT_INVALID_GRAPH) {  // so it says that an optional input is left out
    ort->ReleaseStatus(status);
    return NULL;
  }
  IMSM_TRY(status);
  const OrtTensorTypeAndShapeInfo* tensor = NULL;  // belongs to `declared`
  status = ort->CastTypeInfoToTensorInfo(declared, &tensor);
  if (status == NULL && tensor) status = ort->GetTensorElementType(tensor, type);
  ort->ReleaseTypeInfo(declared);
  return status;
}

OrtStatus* imsm_declared_types(const OrtKernelInfo* info, size_t count, ONNXTensorElementDataType* types) {
  size_t inputs = 0;
  IMSM_TRY(ort->KernelInfo_GetInputCount(info, &inputs));
  for (size_t i = 0; i < count; i++) {
    types[i] = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
    if (i < inputs) IMSM_TRY(declared_type(info, i, &types[i]));
  }
  return NULL;
}

static OrtStatus* read_integer(const OrtKernelInfo* info, const char* name) {
  int64_t value;
  return ort->KernelInfoGetAttribute_int64(info, name, &value);
}

static OrtStatus* read_float(const OrtKernelInfo* info, const char* name) {
  float value;
  return ort->KernelInfoGetAttribute_float(info, name, &value);
}

static OrtStatus* read_string(const OrtKernelInfo* info, const char* name) {
  size_t length = 0;
  return ort->KernelInfoGetAttribute_string(info, name, NULL, &length);
}

// Takes the failure to read an attribute. Returns NULL if the node lacks it. onnxruntime gives ORT_FAIL both for that
// and for an attribute of another type, so it is read as every other type too.
static OrtStatus* unless_absent(const OrtKernelInfo* info, const char* name, OrtStatus* status) {
  OrtStatus* (*const read[])(const OrtKernelInfo*, const char*) = {read_integer, read_float, read_string};
  for (size_t i = 0; ort->GetErrorCode(status) == ORT_FAIL; i++) {
    ort->ReleaseStatus(status);
    if (i == sizeof read / sizeof *read) return NULL;
    status = read[i](info, name);
    if (status == NULL) return imsm_failure("attribute %s has the wrong type", name);
  }
  return status;
}

OrtStatus* imsm_int_attribute(const OrtKernelInfo* info, const char* name, int64_t otherwise, int64_t* value) {
  OrtStatus* status = ort->KernelInfoGetAttribute_int64(info, name, value);
  if (status == NULL) return NULL;
  *value = otherwise;
  return unless_absent(info, name, status);
}

OrtStatus* imsm_float_attribute(const OrtKernelInfo* info, const char* name, float otherwise, float* value) {
  OrtStatus* status = ort->KernelInfoGetAttribute_float(info, name, value);
  if (status == NULL) return NULL;
  *value = otherwise;
  return unless_absent(info, name, status);
}

OrtStatus* imsm_allocate(size_t count, size_t size, void** memory) {
  const size_t bytes = imsm_times(count, size);
  *memory = NULL;
  if (bytes <= SIZE_MAX - IMSM_ALIGNMENT)
    *memory = aligned_alloc(IMSM_ALIGNMENT, (bytes / IMSM_ALIGNMENT + 1) * IMSM_ALIGNMENT);
  return *memory ? NULL : imsm_failure("out of memory: %zu bytes are needed", bytes);
}

OrtStatus* imsm_parallel_for(const OrtKernelContext* context, ImsmTask task, size_t total, void* arguments) {
  return ort->KernelContext_ParallelFor(context, task, total, 0, arguments);
}
