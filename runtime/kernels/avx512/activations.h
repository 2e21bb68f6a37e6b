// Activations rounded to int8, with one scale for 32 of them, as accuracy_level 4 of com.microsoft.MatMulNBits allows.
//
// A byte of int4 holds an even weight in its low half and the odd one behind it in its high half, so that a block's
// activations are stored as evens and odds too; those for int8 as the first and the last sixteen. A weight q stands for
// q - 8 (int8: q - 128): sum (q - 8) a = sum q a - 8 sum a, and the second sum depends on the activations alone: dot
// products start from it, or from the same sum times another zero point.
#pragma once

#include "../kernels.h"

enum {
  IMSM_BLOCK = 32,   // activations with one scale
  IMSM_CHUNK = 128,  // weights that are read at once
  IMSM_FEW = 16,     // rows up to which columns are read one by one
};

// 128 activations of one row; each lane is of eight of them.
typedef struct {
  int8_t even[IMSM_CHUNK / 2], odd[IMSM_CHUNK / 2];
  int32_t start[16];  // -8 sum, or -128 sum
  float scale[16];
} ImsmChunk;

// 32 activations of one row.
typedef struct {
  int8_t even[IMSM_BLOCK / 2], odd[IMSM_BLOCK / 2];
  int32_t start;  // -8 sum, or -128 sum
  float scale;
} ImsmBlock;

// Rows of activations, rounded.
typedef struct {
  const float* x;  // (rows, k)
  size_t rows, k, chunks, blocks;
  int bits;             // of the weights that they are rounded for
  ImsmChunk* by_chunk;  // (rows, chunks), where rows are few
  ImsmBlock* by_block;  // (blocks, rows), where they are many
} ImsmActivations;

// log2 of the middle of the range of `bits`, 8 or 128.
static inline int imsm_middle(int bits) { return bits == 4 ? 3 : 7; }

// Rounds `rows` rows of k activations for weights of `bits`. imsm_activations_end frees what it holds, even after a
// failure.
OrtStatus* imsm_activations_begin(ImsmActivations* activations, const OrtKernelContext* context, const float* x,
                                  size_t rows, size_t k, int bits);
void imsm_activations_end(ImsmActivations* activations);
