// A node that multiplies with quantized matrices: its attributes, inputs and output.
#pragma once

#include "quantized_product.h"

// A kernel of these operators.
typedef struct {
  const char* name;         // of the operator
  size_t k, n, block_size;  // at most INT32_MAX
  int bits;
} ImsmProductKernel;

// `create` of these operators: attributes K, N, bits (4 or 8), block_size (32, 64 or 128).
OrtStatus* imsm_product_create(const ImsmOperator* operator, const OrtKernelInfo* info, void** kernel);

// Finds x (..., k) at input 0, as `rows` rows, and makes y (..., n), output 0.
OrtStatus* imsm_product_x_and_y(OrtKernelContext* context, const ImsmProductKernel* kernel, const float** x,
                                size_t* rows, float** y);

// Finds the matrix whose weights are at input `index`, followed by scales, zero points and a bias; without a change.
OrtStatus* imsm_product_matrix(const OrtKernelContext* context, const ImsmProductKernel* kernel, size_t index,
                               ImsmQuantizedMatrix* to);
