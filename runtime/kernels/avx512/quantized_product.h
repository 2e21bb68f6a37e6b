// Products with matrices in blocks of int4 or int8, activations rounded to int8: what several operators share.
#pragma once

#include "../kernels.h"
#include "low_rank.h"

typedef struct Chunk Chunk;
typedef struct Block Block;

// A kernel of these operators: its node's attributes.
typedef struct {
  size_t k, n, block_size;
  int bits;
} ProductKernel;

// CreateKernelV2 of these operators.
OrtStatus* product_create(const OrtCustomOp* op, const OrtApi* ort, const OrtKernelInfo* info, void** kernel);

// Rows of activations, rounded.
typedef struct {
  const float* x;  // (rows, k)
  size_t rows, k, chunks, blocks;
  int bits;         // of the weights that they are rounded for
  Chunk* by_chunk;  // (rows, chunks), where rows are few
  Block* by_block;  // (blocks, rows), where they are many
} Activations;

// A matrix as com.microsoft.MatMulNBits stores it: (n, k) in blocks along k, of two int4 in a byte the low half first.
typedef struct {
  const uint8_t* weights;  // (n, blocks, block_size * bits / 8)
  const void* scales;      // (n, blocks): float32, or float16 where `half`
  int half;
  const uint8_t* zeros;  // (n, blocks * bits / 8 rounded up), or NULL: 8 or 128 everywhere
  const float* bias;     // (n), or NULL
  size_t n, block_size;
  LowRank* change;  // or NULL
} QuantizedMatrix;

// Finds the matrix whose weights are at input `index`, followed by scales, zero points and a bias; without a change.
OrtStatus* product_matrix(const OrtKernelContext* context, const ProductKernel* kernel, size_t index,
                          QuantizedMatrix* to);

// Finds x (rows, k) at an input.
OrtStatus* product_input(const OrtKernelContext* context, const ProductKernel* kernel, size_t index, const float** x,
                         size_t* rows);

// Rounds `rows` rows of k activations for weights of `bits`. product_end frees what it holds.
OrtStatus* product_begin(const OrtKernelContext* context, const float* x, size_t rows, size_t k, int bits,
                         Activations* to);
void product_end(Activations* activations);

// How many tasks the n columns of a product are.
size_t product_tasks(const Activations* activations, size_t n);

// Computes one task's columns of y (rows, n), and says which ones those are.
void product_columns(const Activations* activations, const QuantizedMatrix* matrix, float* y, size_t task,
                     size_t* first, size_t* columns);
