// What the kernels share: the context of one call, and how each is registered.
//
// This folder holds what is the same for every instruction set. A folder of an instruction set, avx512/, holds its
// operators whole, one file each, with the arithmetic that they share: what an operator accepts (sizes of heads, of
// blocks) depends on what its arithmetic can read.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

#include "onnxruntime_c_api.h"

// A function that a thread of the session's pool runs for one of `total` indices.
typedef void (*Task)(void* arguments, size_t index);

// Runs `task` for 0 .. total - 1 in the session's pool of threads.
OrtStatus* parallel_for(const OrtKernelContext* context, Task task, size_t total, void* arguments);

// The values of an input tensor, NULL for one that is left out; `count` gets the number of elements, `last` the size of
// the last dimension.
const void* input(const OrtKernelContext* context, size_t index, size_t* count, size_t* last);

// Whether an input tensor is of float16.
int is_half(const OrtKernelContext* context, size_t index);

// The values of an output tensor of a shape.
float* output(OrtKernelContext* context, size_t index, const int64_t* shape, size_t dimensions);

// The same, of the shape of an input but for its last dimension.
float* output_like(OrtKernelContext* context, size_t index, size_t model, int64_t last);

// An attribute; `otherwise` where the node has none.
int64_t attribute(const OrtKernelInfo* info, const char* name, int64_t otherwise);
float float_attribute(const OrtKernelInfo* info, const char* name, float otherwise);

OrtStatus* failure(const char* message);

const OrtCustomOp* quantized_matmul(void);
const OrtCustomOp* quantized_matmul_low_rank(void);
const OrtCustomOp* quantized_swiglu(void);
const OrtCustomOp* quantized_swiglu_low_rank(void);
const OrtCustomOp* group_query_attention(void);

// What is the same for all operators.
const char* cpu_provider(const OrtCustomOp* op);
OrtMemType default_memory(const OrtCustomOp* op, size_t index);
ONNXTensorElementDataType float_output(const OrtCustomOp* op, size_t index);
OrtCustomOpInputOutputCharacteristic required(const OrtCustomOp* op, size_t index);
int first_version(const OrtCustomOp* op);
int last_version(const OrtCustomOp* op);

#define OPERATOR(NAME, INPUTS, OUTPUTS, INPUT_TYPE, INPUT_CHARACTERISTIC, CREATE, COMPUTE) \
  {.version = ORT_API_VERSION,                                                             \
   .GetName = NAME,                                                                        \
   .GetExecutionProviderType = cpu_provider,                                               \
   .GetInputType = INPUT_TYPE,                                                             \
   .GetInputTypeCount = INPUTS,                                                            \
   .GetOutputType = float_output,                                                          \
   .GetOutputTypeCount = OUTPUTS,                                                          \
   .KernelDestroy = free,                                                                  \
   .GetInputCharacteristic = INPUT_CHARACTERISTIC,                                         \
   .GetOutputCharacteristic = required,                                                    \
   .GetInputMemoryType = default_memory,                                                   \
   .CreateKernelV2 = CREATE,                                                               \
   .KernelComputeV2 = COMPUTE,                                                             \
   .GetStartVersion = first_version,                                                       \
   .GetEndVersion = last_version}
