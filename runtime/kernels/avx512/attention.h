// Attention of new tokens to a cache that holds the keys and values of all tokens, with a causal mask.
#pragma once

#include <stdatomic.h>

#include "../kernels.h"

enum {
  IMSM_HEAD_STEP = 16,      // sizes of heads are multiples of it
  IMSM_LARGEST_HEAD = 256,  // elements of a head
};

// The caller fills the first part, and has checked that its sizes fit one another and the limits above.
typedef struct {
  size_t heads, kv_heads, group;  // group: heads that share a key
  size_t size, window;            // size: of a head; window: positions that a query sees, 0: all
  float scale;
  int rotary, interleaved;
  const float *query, *key, *value;
  size_t query_stride, kv_stride;  // floats from a token to the next
  float *keys, *values;            // caches: (rows, kv_heads, capacity, size)
  const float *cos, *sin;          // (positions, half), where `rotary`
  size_t half;                     // of the rotated part of a head
  const int32_t *lengths, *news;   // (rows) tokens of each row after this step, minus one; new ones
  float* y;                        // (rows, tokens, heads, size)
  size_t rows, tokens, capacity;

  size_t block, blocks;     // tokens of one task; tasks of a row and a key head
  size_t parts;             // of the cache
  float* partial;           // (rows, kv_heads, parts, group, size + 2): sums, largest score, sum of weights
  atomic_size_t* finished;  // (rows, kv_heads)
} ImsmAttention;

// Puts the new keys and values into the caches and computes y. There is at least one row and one token.
OrtStatus* imsm_attention(ImsmAttention* attention, const OrtKernelContext* context);
