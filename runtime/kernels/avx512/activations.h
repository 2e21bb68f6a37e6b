// Activations rounded to int8, with one scale for 32 of them, as accuracy_level 4 of com.microsoft.MatMulNBits allows.
//
// A byte of 4 bits holds an even weight in its low half and the odd one behind it in its high half, so that a block's
// activations are stored as evens and odds too, also for 5 and 6 bits; those for 8 bits as the first and the last
// sixteen. A weight q stands for q - m with the middle m of its range, 8 to 128: sum (q - m) a = sum q a - m sum a, and
// the second sum depends on the activations alone: dot products start from it, or from the same sum times another zero
// point.
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
  int32_t start[16];  // -m sum
  float scale[16];
} ImsmChunk;

// 32 activations of one row.
typedef struct {
  int8_t even[IMSM_BLOCK / 2], odd[IMSM_BLOCK / 2];
  int32_t start;  // -m sum
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

// log2 of the middle of the range of `bits`.
static inline int imsm_middle(int bits) { return bits - 1; }

// Rounds `rows` rows of k activations for weights of `bits`. imsm_activations_end frees what it holds, even after a
// failure.
OrtStatus* imsm_activations_begin(ImsmActivations* activations, const OrtKernelContext* context, const float* x,
                                  size_t rows, size_t k, int bits);
void imsm_activations_end(ImsmActivations* activations);
