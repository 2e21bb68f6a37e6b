// Products of rounded activations with matrices in blocks of int4 or int8.
#pragma once

#include "activations.h"
#include "low_rank.h"

// A matrix as com.microsoft.MatMulNBits stores it: (n, k) in blocks along k, of two int4 in a byte the low half first.
typedef struct {
  const uint8_t* weights;  // (n, blocks, block_size * bits / 8)
  const void* scales;      // (n, blocks): float32, or float16 where `half`
  int half;
  const uint8_t* zeros;  // (n, blocks * bits / 8 rounded up), or NULL: 8 or 128 everywhere
  const float* bias;     // (n), or NULL
  size_t n, block_size;
  ImsmLowRank* change;  // or NULL
} ImsmQuantizedMatrix;

// How many tasks the n columns of a product are split into.
size_t imsm_product_tasks(const ImsmActivations* activations, size_t n);

// Computes one task's columns of y (rows, n), and says which ones those are.
void imsm_product_columns(const ImsmActivations* activations, const ImsmQuantizedMatrix* matrix, float* y, size_t task,
                          size_t* first, size_t* columns);
