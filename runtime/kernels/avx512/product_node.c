#include "product_node.h"

static OrtStatus* read_size(const ImsmOperator* operator, const OrtKernelInfo* info, const char* name, size_t* size) {
  int64_t value = 0;
  IMSM_TRY(imsm_int_attribute(info, name, 0, &value));
  if (value < 1 || value > INT32_MAX)
    return imsm_failure("%s: %s is %lld; it must be 1 to %d", operator->name, name, (long long)value, INT32_MAX);
  *size = (size_t)value;
  return NULL;
}

static OrtStatus* read_attributes(const ImsmOperator* operator, const OrtKernelInfo* info, ImsmProductKernel* kernel) {
  size_t bits = 0;
  IMSM_TRY(read_size(operator, info, "K", &kernel->k));
  IMSM_TRY(read_size(operator, info, "N", &kernel->n));
  IMSM_TRY(read_size(operator, info, "block_size", &kernel->block_size));
  IMSM_TRY(read_size(operator, info, "bits", &bits));
  if (kernel->block_size != 32 && kernel->block_size != 64 && kernel->block_size != 128)
    return imsm_failure("%s: block_size is %zu; it must be 32, 64 or 128", operator->name, kernel->block_size);
  if (bits != 4 && bits != 8) return imsm_failure("%s: bits is %zu; it must be 4 or 8", operator->name, bits);
  kernel->bits = (int)bits;
  return NULL;
}

OrtStatus* imsm_product_create(const ImsmOperator* operator, const OrtKernelInfo* info, void** kernel) {
  ImsmProductKernel found = {.name = operator->name};
  IMSM_TRY(read_attributes(operator, info, &found));
  IMSM_TRY(imsm_allocate(1, sizeof found, kernel));
  *(ImsmProductKernel*)*kernel = found;
  return NULL;
}

OrtStatus* imsm_product_x_and_y(OrtKernelContext* context, const ImsmProductKernel* kernel, const float** x,
                                size_t* rows, float** y) {
  ImsmTensor input;
  IMSM_TRY(imsm_input(context, 0, &input));
  const size_t columns = input.dimensions ? input.shape[input.dimensions - 1] : 0;
  if (columns != kernel->k)
    return imsm_failure("%s: the input has %zu columns, but K is %zu", kernel->name, columns, kernel->k);
  *x = input.data;
  *rows = input.count / kernel->k;
  input.shape[input.dimensions - 1] = kernel->n;
  return imsm_output(context, 0, input.shape, input.dimensions, y);
}

static OrtStatus* check_count(const ImsmProductKernel* kernel, const char* what, const ImsmTensor* found,
                              size_t wanted) {
  if (found->count == wanted) return NULL;
  return imsm_failure("%s: there are %zu %s, but K %zu and N %zu need %zu", kernel->name, found->count, what, kernel->k,
                      kernel->n, wanted);
}

OrtStatus* imsm_product_matrix(const OrtKernelContext* context, const ImsmProductKernel* kernel, size_t index,
                               ImsmQuantizedMatrix* to) {
  ImsmTensor weights, scales, zeros, bias;
  IMSM_TRY(imsm_input(context, index, &weights));
  IMSM_TRY(imsm_input(context, index + 1, &scales));
  IMSM_TRY(imsm_optional_input(context, index + 2, &zeros));
  IMSM_TRY(imsm_optional_input(context, index + 3, &bias));
  const size_t n = kernel->n, bits = (size_t)kernel->bits;
  const size_t blocks = (kernel->k + kernel->block_size - 1) / kernel->block_size;
  // Two sizes below 2^32 each, so that their products do not overflow.
  IMSM_TRY(check_count(kernel, "bytes of weights", &weights, n * (blocks * kernel->block_size / 8 * bits)));
  IMSM_TRY(check_count(kernel, "scales", &scales, n * blocks));
  if (zeros.given) IMSM_TRY(check_count(kernel, "bytes of zero points", &zeros, n * ((blocks * bits + 7) / 8)));
  if (bias.given) IMSM_TRY(check_count(kernel, "biases", &bias, n));
  const int half = scales.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
  if (!half && scales.type != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT)
    return imsm_failure("%s: the scales are neither float32 nor float16", kernel->name);
  *to = (ImsmQuantizedMatrix){.weights = weights.data,
                              .scales = scales.data,
                              .half = half,
                              .zeros = zeros.data,
                              .bias = bias.data,
                              .n = n,
                              .block_size = kernel->block_size};
  return NULL;
}
