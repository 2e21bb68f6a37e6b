// An operator, and what its nodes must be: a table of attributes and one of inputs, which whatever is read is held
// against, so that no kernel reads past the end of what it is given.
//
// The dimensions of inputs are sizes, which an operator numbers and names. A size is known from the attributes, or the
// first input that has it tells it.
#pragma once

#include "kernels.h"

#define IMSM_UNKNOWN SIZE_MAX

enum { IMSM_MOST_ALLOWED = 4, IMSM_MOST_ATTRIBUTES = 8, IMSM_MOST_INPUTS = 16, IMSM_MOST_SIZES = 16 };

// Sets of types.
enum { IMSM_FLOAT32 = 1, IMSM_FLOAT16 = 2, IMSM_UINT8 = 4, IMSM_INT32 = 8, IMSM_INT64 = 16 };

// An attribute, which is an integer: one of `allowed`, or from `least` to `most` where that is empty.
typedef struct {
  const char* name;
  int64_t otherwise;  // where a node has none of that name
  int64_t least, most;
  int64_t allowed[IMSM_MOST_ALLOWED];  // up to the first 0
} ImsmAttribute;

typedef enum {
  IMSM_SHAPE,          // these sizes
  IMSM_SHAPE_OR_FLAT,  // these sizes, which are known, or one dimension of as many elements
  IMSM_ELEMENTS,       // any dimensions of as many elements as these sizes, which are known
  IMSM_LINES,          // any dimensions: the last is the second size, and the others together are the first
  IMSM_FRACTION,       // any dimensions of a number of elements that divides the only size, which is known
} ImsmForm;

typedef struct {
  const char* name;
  int types;
  ImsmForm form;
  uint8_t dimensions;  // of `sizes`
  uint8_t sizes[4];
  int optional;
} ImsmInput;

// An operator of domain "imsm". Its outputs are float32, and none is optional.
struct ImsmOperator {
  const char* name;
  const ImsmAttribute* attributes;
  const ImsmInput* inputs;
  const char* const* sizes;  // their names
  size_t attribute_count, input_count, output_count;
  // Makes a kernel of a node's attributes, which are in the order of the table; free() releases it.
  OrtStatus* (*create)(const ImsmOperator* operator, const OrtKernelInfo* info, const int64_t* attributes,
                       void** kernel);
  OrtStatus* (*compute)(void* kernel, OrtKernelContext* context);
};

// The type of a set of one; UNDEFINED for a larger one, which onnxruntime takes for any type.
ONNXTensorElementDataType imsm_only_type(int types);

// Makes a kernel of a node: `create` after its attributes and the types of its inputs were held against the tables.
OrtStatus* imsm_create(const ImsmOperator* operator, const OrtKernelInfo* info, void** kernel);

// The inputs of one call.
typedef struct {
  const ImsmOperator* operator;
  const OrtKernelContext* context;
  size_t sizes[IMSM_MOST_SIZES];  // IMSM_UNKNOWN until something tells it
} ImsmInputs;

// No size is known.
ImsmInputs imsm_inputs(const ImsmOperator* operator, const OrtKernelContext* context);

// Finds an input and holds it against the table.
OrtStatus* imsm_read(ImsmInputs* inputs, size_t index, ImsmTensor* tensor);

// The same for one that the table calls optional, but this node needs.
OrtStatus* imsm_read_needed(ImsmInputs* inputs, size_t index, ImsmTensor* tensor);
