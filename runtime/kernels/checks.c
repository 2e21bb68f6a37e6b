#include "checks.h"

#include <stdarg.h>
#include <stdio.h>

// A text that grows, and is cut off at its end.
typedef struct {
  char text[320];
  size_t length;
} Text;

__attribute__((format(printf, 2, 3))) static void put(Text* to, const char* format, ...) {
  va_list values;
  va_start(values, format);
  const int more = vsnprintf(to->text + to->length, sizeof to->text - to->length, format, values);
  va_end(values);
  if (more > 0) to->length += (size_t)more;
  if (to->length >= sizeof to->text) to->length = sizeof to->text - 1;
}

// "a", "a or b", "a, b or c"
static const char* separator(size_t index, size_t count) {
  return index == 0 ? "" : index + 1 == count ? " or " : ", ";
}

// ---- types

static const struct {
  ONNXTensorElementDataType type;
  int set;
  const char* name;
} TYPES[] = {
    {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, IMSM_FLOAT32, "float32"},
    {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, IMSM_FLOAT16, "float16"},
    {ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, IMSM_UINT8, "uint8"},
    {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32, IMSM_INT32, "int32"},
    {ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE, 0, "float64"},
    {ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16, 0, "bfloat16"},
    {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8, 0, "int8"},
    {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, IMSM_INT64, "int64"},
    {ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL, 0, "bool"},
};
enum { TYPE_COUNT = sizeof TYPES / sizeof *TYPES };

static int has_type(int types, ONNXTensorElementDataType type) {
  for (size_t i = 0; i < TYPE_COUNT; i++)
    if (TYPES[i].type == type) return (types & TYPES[i].set) != 0;
  return 0;
}

ONNXTensorElementDataType imsm_only_type(int types) {
  for (size_t i = 0; i < TYPE_COUNT; i++)
    if (TYPES[i].set == types) return TYPES[i].type;
  return ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
}

static OrtStatus* wrong_type(const ImsmOperator* operator, const ImsmInput* input, ONNXTensorElementDataType type) {
  Text found = {0}, wanted = {0};
  size_t count = 0, named = 0;
  for (size_t i = 0; i < TYPE_COUNT; i++) {
    count += (input->types & TYPES[i].set) != 0;
    if (TYPES[i].type == type) put(&found, "%s", TYPES[i].name);
  }
  for (size_t i = 0; i < TYPE_COUNT; i++)
    if (input->types & TYPES[i].set) put(&wanted, "%s%s", separator(named++, count), TYPES[i].name);
  if (found.length == 0) put(&found, "of onnxruntime's type %d", (int)type);
  return imsm_failure("%s: %s is %s; it must be %s", operator->name, input->name, found.text, wanted.text);
}

// ---- attributes

static OrtStatus* read_attribute(const ImsmOperator* operator, const OrtKernelInfo* info,
                                 const ImsmAttribute* attribute, int64_t* value) {
  IMSM_TRY(imsm_int_attribute(info, attribute->name, attribute->otherwise, value));
  Text wanted = {0};
  size_t count = 0;
  while (count < IMSM_MOST_ALLOWED && attribute->allowed[count]) count++;
  for (size_t i = 0; i < count; i++) {
    if (*value == attribute->allowed[i]) return NULL;
    put(&wanted, "%s%lld", separator(i, count), (long long)attribute->allowed[i]);
  }
  if (count == 0) {
    if (*value >= attribute->least && *value <= attribute->most) return NULL;
    put(&wanted, "%lld to %lld", (long long)attribute->least, (long long)attribute->most);
  }
  return imsm_failure("%s: %s is %lld; it must be %s", operator->name, attribute->name, (long long)*value, wanted.text);
}

OrtStatus* imsm_create(const ImsmOperator* operator, const OrtKernelInfo* info, void** kernel) {
  int64_t values[IMSM_MOST_ATTRIBUTES];
  ONNXTensorElementDataType types[IMSM_MOST_INPUTS];
  for (size_t i = 0; i < operator->attribute_count; i++)
    IMSM_TRY(read_attribute(operator, info, &operator->attributes[i], &values[i]));
  IMSM_TRY(imsm_declared_types(info, operator->input_count, types));
  for (size_t i = 0; i < operator->input_count; i++)
    if (types[i] != ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED && !has_type(operator->inputs[i].types, types[i]))
      return wrong_type(operator, &operator->inputs[i], types[i]);
  return operator->create(operator, info, values, kernel);
}

// ---- inputs

ImsmInputs imsm_inputs(const ImsmOperator* operator, const OrtKernelContext* context) {
  imsm_reserve_failure();  // an earlier call may have returned the last one
  ImsmInputs inputs = {.operator = operator, .context = context};
  for (size_t i = 0; i < IMSM_MOST_SIZES; i++) inputs.sizes[i] = IMSM_UNKNOWN;
  return inputs;
}

static size_t wanted_elements(const ImsmInputs* inputs, const ImsmInput* input) {
  size_t count = 1;
  for (size_t d = 0; d < input->dimensions; d++) count = imsm_times(count, inputs->sizes[input->sizes[d]]);
  return count;
}

// Whether a dimension is `size`, which it tells where that is unknown.
static int agrees(size_t* size, size_t dimension) {
  if (*size == IMSM_UNKNOWN) *size = dimension;
  return *size == dimension;
}

static int fits(ImsmInputs* inputs, const ImsmInput* input, const ImsmTensor* tensor) {
  size_t* const sizes = inputs->sizes;
  switch (input->form) {
    case IMSM_ELEMENTS:
      return tensor->count == wanted_elements(inputs, input);
    case IMSM_FRACTION: {
      const size_t size = sizes[input->sizes[0]];
      return tensor->count ? size % tensor->count == 0 : size == 0;
    }
    case IMSM_LINES: {
      size_t lines = 1;
      for (size_t d = 0; d + 1 < tensor->dimensions; d++) lines = imsm_times(lines, tensor->shape[d]);
      return tensor->dimensions && agrees(&sizes[input->sizes[1]], tensor->shape[tensor->dimensions - 1]) &&
             agrees(&sizes[input->sizes[0]], lines);
    }
    case IMSM_SHAPE_OR_FLAT:
      if (tensor->dimensions == 1 && tensor->count == wanted_elements(inputs, input)) return 1;
      break;
    case IMSM_SHAPE:
      break;
  }
  if (tensor->dimensions != input->dimensions) return 0;
  for (size_t d = 0; d < tensor->dimensions; d++)
    if (!agrees(&sizes[input->sizes[d]], tensor->shape[d])) return 0;
  return 1;
}

static void put_sizes(Text* to, const ImsmInputs* inputs, const ImsmInput* input) {
  for (size_t d = 0; d < input->dimensions; d++) {
    const uint8_t number = input->sizes[d];
    const size_t size = inputs->sizes[number];
    put(to, "%s%s", d ? ", " : "", inputs->operator->sizes[number]);
    if (size != IMSM_UNKNOWN) put(to, " %zu", size);
  }
}

// `before`: the sizes that were known before it was read.
static OrtStatus* wrong_shape(const ImsmInputs* before, const ImsmInput* input, const ImsmTensor* tensor) {
  Text found = {0}, wanted = {0}, sizes = {0};
  for (size_t d = 0; d < tensor->dimensions; d++) put(&found, "%s%zu", d ? ", " : "", tensor->shape[d]);
  put_sizes(&sizes, before, input);
  switch (input->form) {
    case IMSM_SHAPE:
      put(&wanted, "be (%s)", sizes.text);
      break;
    case IMSM_SHAPE_OR_FLAT:
      put(&wanted, "be (%s), or have %zu elements in one dimension", sizes.text, wanted_elements(before, input));
      break;
    case IMSM_ELEMENTS:
      if (input->dimensions)
        put(&wanted, "have %zu elements (%s)", wanted_elements(before, input), sizes.text);
      else
        put(&wanted, "have one element");
      break;
    case IMSM_LINES:
      put(&wanted, "be (..., %s %zu)", before->operator->sizes[input->sizes[1]], before->sizes[input->sizes[1]]);
      break;
    case IMSM_FRACTION:
      put(&wanted, "have a number of elements that divides %s", sizes.text);
      break;
  }
  return imsm_failure("%s: %s is (%s); it must %s", before->operator->name, input->name, found.text, wanted.text);
}

OrtStatus* imsm_read(ImsmInputs* inputs, size_t index, ImsmTensor* tensor) {
  const ImsmInput* input = &inputs->operator->inputs[index];
  IMSM_TRY(imsm_find_input(inputs->context, index, tensor));
  if (!tensor->given)
    return input->optional ? NULL : imsm_failure("%s: %s is missing", inputs->operator->name, input->name);
  if (!has_type(input->types, tensor->type)) return wrong_type(inputs->operator, input, tensor->type);
  if (tensor->dimensions > IMSM_MOST_DIMENSIONS)
    return imsm_failure("%s: %s has %zu dimensions; it may have %d", inputs->operator->name, input->name,
                        tensor->dimensions, IMSM_MOST_DIMENSIONS);
  const ImsmInputs before = *inputs;
  return fits(inputs, input, tensor) ? NULL : wrong_shape(&before, input, tensor);
}

OrtStatus* imsm_read_needed(ImsmInputs* inputs, size_t index, ImsmTensor* tensor) {
  IMSM_TRY(imsm_read(inputs, index, tensor));
  const ImsmOperator* operator = inputs->operator;
  return tensor->given ? NULL : imsm_failure("%s: %s is missing", operator->name, operator->inputs[index].name);
}
