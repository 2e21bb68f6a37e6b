// A node that multiplies with quantized matrices: its attributes, inputs and output.
#pragma once

#include "quantized_product.h"

// The sizes of these operators. The two changes of a node may differ in rank.
enum {
  IMSM_ROWS,
  IMSM_K,
  IMSM_N,
  IMSM_BLOCKS,
  IMSM_BLOCK_BYTES,
  IMSM_ZERO_BYTES,
  IMSM_GROUPS,
  IMSM_GROUP_BYTES,
  IMSM_RANK,
  IMSM_OTHER_RANK,
  IMSM_PRODUCT_SIZES
};
extern const char* const imsm_product_sizes[IMSM_PRODUCT_SIZES];

enum { IMSM_PRODUCT_ATTRIBUTES = 4 };
extern const ImsmAttribute imsm_product_attributes[IMSM_PRODUCT_ATTRIBUTES];

// Inputs of a matrix: weights, scales, zero points, bias; of a change: A, B. A matrix of 5 or 6 bits has one more,
// which comes after all others: nodes of 4 and 8 bits end without it.
enum { IMSM_MATRIX = 4, IMSM_CHANGE = 2 };

// Rows of the table of inputs, from FIRST on.
// clang-format off
#define IMSM_X_INPUT(FIRST) [FIRST] = {"x", IMSM_FLOAT32, IMSM_LINES, 2, {IMSM_ROWS, IMSM_K}}
#define IMSM_MATRIX_INPUTS(FIRST, PREFIX)                                                                            \
  [FIRST] = {PREFIX "weights", IMSM_UINT8, IMSM_SHAPE_OR_FLAT, 3, {IMSM_N, IMSM_BLOCKS, IMSM_BLOCK_BYTES}},          \
  [FIRST + 1] = {PREFIX "scales", IMSM_FLOAT32 | IMSM_FLOAT16, IMSM_SHAPE_OR_FLAT, 2, {IMSM_N, IMSM_BLOCKS}},        \
  [FIRST + 2] = {PREFIX "zero_points", IMSM_UINT8, IMSM_SHAPE_OR_FLAT, 2, {IMSM_N, IMSM_ZERO_BYTES}, .optional = 1}, \
  [FIRST + 3] = {PREFIX "bias", IMSM_FLOAT32, IMSM_SHAPE, 1, {IMSM_N}, .optional = 1}
#define IMSM_MORE_INPUT(FIRST, PREFIX)                                                                               \
  [FIRST] = {PREFIX "more", IMSM_UINT8, IMSM_SHAPE_OR_FLAT, 3, {IMSM_N, IMSM_GROUPS, IMSM_GROUP_BYTES}, .optional = 1}
#define IMSM_FACTORS_INPUT(FIRST) [FIRST] = {"rows", IMSM_FLOAT32, IMSM_FRACTION, 1, {IMSM_ROWS}}
#define IMSM_CHANGE_INPUTS(FIRST, PREFIX, RANK)                                           \
  [FIRST] = {PREFIX "a", IMSM_FLOAT32 | IMSM_FLOAT16, IMSM_SHAPE, 2, {IMSM_K, RANK}},     \
  [FIRST + 1] = {PREFIX "b", IMSM_FLOAT32 | IMSM_FLOAT16, IMSM_SHAPE, 2, {RANK, IMSM_N}}
// clang-format on

// A kernel of these operators.
typedef struct {
  const ImsmOperator* operator;
  size_t k, n, block_size;  // at most INT32_MAX
  int bits;
} ImsmProductKernel;

// `create` of these operators.
OrtStatus* imsm_product_create(const ImsmOperator* operator, const OrtKernelInfo* info, const int64_t* attributes,
                               void** kernel);

#define IMSM_PRODUCT_OPERATOR(NAME, INPUTS, INPUT_COUNT, COMPUTE) \
  {.name = NAME,                                                  \
   .attributes = imsm_product_attributes,                         \
   .attribute_count = IMSM_PRODUCT_ATTRIBUTES,                    \
   .inputs = INPUTS,                                              \
   .input_count = INPUT_COUNT,                                    \
   .sizes = imsm_product_sizes,                                   \
   .output_count = 1,                                             \
   .create = imsm_product_create,                                 \
   .compute = COMPUTE}

// The inputs of a call, with the sizes that the attributes tell.
ImsmInputs imsm_product_inputs(const ImsmProductKernel* kernel, const OrtKernelContext* context);

// Makes y (..., n), output 0, for x (..., k), input 0. Comes after all inputs were read: n is as large as a node says.
OrtStatus* imsm_product_y(OrtKernelContext* context, const ImsmProductKernel* kernel, const ImsmTensor* x, float** y);

// Reads the matrix whose weights are at input `index`, followed by scales, zero points and a bias, and what 5 and 6
// bits have more at input `more_index`; without a change.
OrtStatus* imsm_product_matrix(ImsmInputs* inputs, const ImsmProductKernel* kernel, size_t index, size_t more_index,
                               ImsmQuantizedMatrix* to);
