// Products with matrices in blocks of int4 or int8, activations rounded to int8: what several operators share.
#pragma once

#include "kernels.h"
#include "low_rank.h"

typedef struct Chunk Chunk;
typedef struct Block Block;

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
  const uint8_t* zeros;    // (n, blocks * bits / 8 rounded up), or NULL: 8 or 128 everywhere
  const float* bias;       // (n), or NULL
  size_t n, block_size;
  LowRank* change;         // or NULL
} QuantizedMatrix;

// The matrix whose weights are at input `index`, followed by scales, zero points and a bias; without a change.
QuantizedMatrix product_matrix(const OrtKernelContext* context, size_t index, size_t n, size_t block_size);

// Rounds `rows` rows of k activations for weights of `bits`. product_end frees what it holds.
OrtStatus* product_begin(const OrtKernelContext* context, const float* x, size_t rows, size_t k, int bits,
                         Activations* to);
void product_end(Activations* activations);

// How many tasks the n columns of a product are.
size_t product_tasks(const Activations* activations, size_t n);

// Computes one task's columns of y (rows, n), and says which ones those are.
void product_columns(const Activations* activations, const QuantizedMatrix* matrix, float* y, size_t task, size_t* first,
                  size_t* columns);
