// Products of rounded activations with matrices in blocks of 4, 5, 6 or 8 bits.
#pragma once

#include "activations.h"
#include "low_rank.h"

// Bits of a weight that lie as in com.microsoft.MatMulNBits, and how many others lie apart.
static inline int imsm_stored(int bits) { return bits == 8 ? 8 : 4; }
static inline int imsm_extra(int bits) { return bits - imsm_stored(bits); }

// A matrix (n, k) in blocks along k, as com.microsoft.MatMulNBits stores it: of two weights in a byte the low half
// first. Of 5 and 6 bits these are the high four. `more` has the other bits, for each 128 weights in 8 * extra bytes
// for the 64 even ones and as many for the odd ones: field f of byte b, in bits extra * f and up, is of number 8 *
// extra * f + b of those.
typedef struct {
  const uint8_t* weights;  // (n, blocks, block_size * stored bits / 8)
  const uint8_t* more;     // (n, chunks, 16 * extra), or NULL
  const void* scales;      // (n, blocks): float32, or float16 where `half`
  int half;
  const uint8_t* zeros;  // (n, blocks), of 4 bits (n, blocks / 2 rounded up), or NULL: the middle everywhere
  const float* bias;     // (n), or NULL
  size_t n, block_size;
  ImsmLowRank* change;  // or NULL
} ImsmQuantizedMatrix;

// How many tasks the n columns of a product are split into.
size_t imsm_product_tasks(const ImsmActivations* activations, size_t n);

// Computes one task's columns of y (rows, n), and says which ones those are.
void imsm_product_columns(const ImsmActivations* activations, const ImsmQuantizedMatrix* matrix, float* y, size_t task,
                          size_t* first, size_t* columns);
