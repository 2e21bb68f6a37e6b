#include "product_node.h"

const char* const imsm_product_sizes[IMSM_PRODUCT_SIZES] = {
    [IMSM_ROWS] = "rows",
    [IMSM_K] = "K",
    [IMSM_N] = "N",
    [IMSM_BLOCKS] = "blocks",
    [IMSM_BLOCK_BYTES] = "bytes of a block",
    [IMSM_ZERO_BYTES] = "bytes of zero points",
    [IMSM_GROUPS] = "groups of 128",
    [IMSM_GROUP_BYTES] = "bytes of a group",
    [IMSM_RANK] = "rank",
    [IMSM_OTHER_RANK] = "rank",
};

enum { K, N, BITS, BLOCK_SIZE };

const ImsmAttribute imsm_product_attributes[IMSM_PRODUCT_ATTRIBUTES] = {
    [K] = {"K", .least = 1, .most = INT32_MAX},
    [N] = {"N", .least = 1, .most = INT32_MAX},
    [BITS] = {"bits", .allowed = {4, 5, 6, 8}},
    [BLOCK_SIZE] = {"block_size", .allowed = {32, 64, 128}},
};

OrtStatus* imsm_product_create(const ImsmOperator* operator, const OrtKernelInfo* info, const int64_t* attributes,
                               void** kernel) {
  (void)info;
  IMSM_TRY(imsm_allocate(1, sizeof(ImsmProductKernel), kernel));
  *(ImsmProductKernel*)*kernel = (ImsmProductKernel){.operator = operator,
                                                     .k = (size_t)attributes[K],
                                                     .n = (size_t)attributes[N],
                                                     .block_size = (size_t)attributes[BLOCK_SIZE],
                                                     .bits = (int)attributes[BITS]};
  return NULL;
}

ImsmInputs imsm_product_inputs(const ImsmProductKernel* kernel, const OrtKernelContext* context) {
  const size_t blocks = (kernel->k + kernel->block_size - 1) / kernel->block_size;
  ImsmInputs inputs = imsm_inputs(kernel->operator, context);
  inputs.sizes[IMSM_K] = kernel->k;
  inputs.sizes[IMSM_N] = kernel->n;
  inputs.sizes[IMSM_BLOCKS] = blocks;
  inputs.sizes[IMSM_BLOCK_BYTES] = kernel->block_size * (size_t)imsm_stored(kernel->bits) / 8;
  inputs.sizes[IMSM_ZERO_BYTES] = kernel->bits == 4 ? (blocks + 1) / 2 : blocks;
  inputs.sizes[IMSM_GROUPS] = (kernel->k + IMSM_CHUNK - 1) / IMSM_CHUNK;
  inputs.sizes[IMSM_GROUP_BYTES] = IMSM_CHUNK * (size_t)imsm_extra(kernel->bits) / 8;
  return inputs;
}

OrtStatus* imsm_product_y(OrtKernelContext* context, const ImsmProductKernel* kernel, const ImsmTensor* x, float** y) {
  ImsmTensor like = *x;
  like.shape[like.dimensions - 1] = kernel->n;
  return imsm_output(context, 0, like.shape, like.dimensions, y);
}

OrtStatus* imsm_product_matrix(ImsmInputs* inputs, const ImsmProductKernel* kernel, size_t index, size_t more_index,
                               ImsmQuantizedMatrix* to) {
  ImsmTensor weights, scales, zeros, bias, more;
  IMSM_TRY(imsm_read(inputs, index, &weights));
  IMSM_TRY(imsm_read(inputs, index + 1, &scales));
  IMSM_TRY(imsm_read(inputs, index + 2, &zeros));
  IMSM_TRY(imsm_read(inputs, index + 3, &bias));
  IMSM_TRY((imsm_extra(kernel->bits) ? imsm_read_needed : imsm_read)(inputs, more_index, &more));
  *to = (ImsmQuantizedMatrix){.weights = weights.data,
                              .more = more.data,
                              .scales = scales.data,
                              .half = scales.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16,
                              .zeros = zeros.data,
                              .bias = bias.data,
                              .n = kernel->n,
                              .block_size = kernel->block_size};
  return NULL;
}
