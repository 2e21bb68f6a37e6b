// Products with matrices in symmetric int4 blocks, activations rounded to int8: what several operators share.
#pragma once

#include "kernels.h"
#include "low_rank.h"

typedef struct Chunk Chunk;
typedef struct Block Block;

// Rows of activations, rounded.
typedef struct {
  const float* x;  // (rows, k)
  size_t rows, k, chunks, blocks;
  Chunk* by_chunk;  // (rows, chunks), where rows are few
  Block* by_block;  // (blocks, rows), where they are many
} Activations;

// A matrix as com.microsoft.MatMulNBits stores it: (n, k) in blocks along k, low half of a byte first.
typedef struct {
  const uint8_t* weights;  // (n, blocks, block_size / 2)
  const void* scales;      // (n, blocks): float32, or float16 where `half`
  int half;
  const float* bias;       // (n), or NULL
  size_t n, block_size;
  LowRank* change;         // or NULL
} Int4Matrix;

// The matrix at inputs `index` (weights), the next one (scales) and the one after (bias, if any), without a change.
Int4Matrix int4_matrix(const OrtKernelContext* context, size_t index, size_t n, size_t block_size);

// Rounds `rows` rows of k activations. int4_end frees what it holds.
OrtStatus* int4_begin(const OrtKernelContext* context, const float* x, size_t rows, size_t k, Activations* to);
void int4_end(Activations* activations);

// How many tasks the n columns of a product are.
size_t int4_tasks(const Activations* activations, size_t n);

// Computes one task's columns of y (rows, n), and says which ones those are.
void int4_columns(const Activations* activations, const Int4Matrix* matrix, float* y, size_t task, size_t* first,
                  size_t* columns);
