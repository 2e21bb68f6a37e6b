#include "low_rank.h"

#include <sched.h>
#include <stdlib.h>

#include "target.h"

enum {
  LANES = 16,
  PART = 512,    // of k, where rows are few
  GROUP = 16,    // rows, where they are many
  MANY = 8,      // rows that share a value of A
  TOGETHER = 4,  // rows that share a value of B
  CHAINS = 4,    // sums of a row
  PATIENCE = 1000,
};

TARGET static inline __m512 load(const void* values, int half, size_t at, __mmask16 lanes) {
  if (half) return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes, (const uint16_t*)values + at));
  return _mm512_maskz_loadu_ps(lanes, (const float*)values + at);
}

static __mmask16 first_lanes(size_t count) { return count >= LANES ? 0xffff : (__mmask16)((1u << count) - 1); }

OrtStatus* imsm_low_rank_begin(ImsmLowRank* change, ImsmInputs* inputs, size_t factors_index, size_t a_index,
                               const float* x, size_t rows, size_t k, size_t n) {
  ImsmTensor row_factors, a, b;
  IMSM_TRY(imsm_read(inputs, factors_index, &row_factors));
  IMSM_TRY(imsm_read(inputs, a_index, &a));
  IMSM_TRY(imsm_read(inputs, a_index + 1, &b));
  if (rows == 0) return NULL;
  change->x = x;
  change->k = k;
  change->n = n;
  change->a = a.data;
  change->b = b.data;
  change->half_a = a.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
  change->half_b = b.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
  change->rank = a.shape[1];
  change->width = (change->rank + LANES - 1) / LANES * LANES;
  const float* factors = row_factors.data;
  const size_t repeated = rows / row_factors.count;
  for (size_t row = 0; row < rows; row++) change->rows += factors[row / repeated] != 0;
  const int few = change->rows <= GROUP;
  change->parts = few ? (change->k + PART - 1) / PART : 1;
  change->groups = few ? 1 : (change->rows + GROUP - 1) / GROUP;
  const size_t low = imsm_times(imsm_times(change->parts, change->width), change->rows);
  const size_t bytes_per_row = sizeof(size_t) + sizeof(float);
  if (low > SIZE_MAX / 2 / sizeof(float))
    return imsm_failure("a low-rank change of rank %zu is too large", change->rank);
  void* memory;
  IMSM_TRY(imsm_allocate(low * sizeof(float) + imsm_times(change->rows, bytes_per_row), 1, &memory));
  change->low = memory;
  change->index = (size_t*)(change->low + low);  // `width` is of whole registers, so that this is aligned
  change->factor = (float*)(change->index + change->rows);
  size_t found = 0;
  for (size_t row = 0; row < rows; row++) {
    const float factor = factors[row / repeated];
    if (factor == 0) continue;
    change->index[found] = row;
    change->factor[found++] = factor;
  }
  atomic_init(&change->claimed, 0);
  atomic_init(&change->done, 0);
  atomic_init(&change->ready, change->rows == 0);
  return NULL;
}

void imsm_low_rank_end(ImsmLowRank* change) { free(change->low); }

// x A of `rows` changed rows, which is a constant where this is inlined, for ranks [r, r + 16) and k [start, end).
// chains: 1, or CHAINS for sums that do not wait for one another.
TARGET static inline __attribute__((always_inline)) void multiply(const ImsmLowRank* change, size_t part, size_t first,
                                                                  const int rows, const int chains, size_t r,
                                                                  size_t start, size_t end) {
  const __mmask16 lanes = first_lanes(change->rank - r);
  const float* x[MANY];
  __m512 sums[MANY], others[TOGETHER][CHAINS];
  for (int row = 0; row < rows; row++) {
    x[row] = change->x + change->index[first + (size_t)row] * change->k;
    sums[row] = _mm512_setzero_ps();
  }
  size_t k = start;
  if (chains == CHAINS) {
    for (int row = 0; row < rows; row++)
      for (int i = 0; i < CHAINS; i++) others[row][i] = _mm512_setzero_ps();
    for (; k + CHAINS <= end; k += CHAINS)
      for (int i = 0; i < CHAINS; i++) {
        const __m512 a = load(change->a, change->half_a, (k + (size_t)i) * change->rank + r, lanes);
        for (int row = 0; row < rows; row++)
          others[row][i] = _mm512_fmadd_ps(_mm512_set1_ps(x[row][k + (size_t)i]), a, others[row][i]);
      }
    for (int row = 0; row < rows; row++)
      sums[row] =
          _mm512_add_ps(_mm512_add_ps(others[row][0], others[row][1]), _mm512_add_ps(others[row][2], others[row][3]));
  }
  for (; k < end; k++) {
    const __m512 a = load(change->a, change->half_a, k * change->rank + r, lanes);
    for (int row = 0; row < rows; row++) sums[row] = _mm512_fmadd_ps(_mm512_set1_ps(x[row][k]), a, sums[row]);
  }
  for (int row = 0; row < rows; row++) {
    const size_t changed = first + (size_t)row;
    _mm512_storeu_ps(change->low + (part * change->rows + changed) * change->width + r,
                     _mm512_mul_ps(sums[row], _mm512_set1_ps(change->factor[changed])));
  }
}

// Where rows are few, each has the sum that it has alone, however many there are: tokens that are guessed and fed
// together then get the logits of single steps.
TARGET static void multiply_rows(const ImsmLowRank* change, size_t part, size_t first, size_t rows, size_t start,
                                 size_t end) {
  const int few = change->rows <= GROUP;
  for (size_t r = 0; r < change->rank; r += LANES)
    for (size_t row = first; row < first + rows;) {
      const size_t left = first + rows - row;
      if (!few && left >= MANY) {
        multiply(change, part, row, MANY, 1, r, start, end);
        row += MANY;
      } else if (left >= TOGETHER) {
        if (few)
          multiply(change, part, row, TOGETHER, CHAINS, r, start, end);
        else
          multiply(change, part, row, TOGETHER, 1, r, start, end);
        row += TOGETHER;
      } else {
        multiply(change, part, row++, 1, CHAINS, r, start, end);
      }
    }
}

TARGET void imsm_low_rank_wait(ImsmLowRank* change) {
  const size_t all = change->parts * change->groups;
  unsigned waited = 0;
  while (!atomic_load_explicit(&change->ready, memory_order_acquire)) {
    const size_t mine = atomic_fetch_add(&change->claimed, 1);
    if (mine >= all) {  // another thread is about to finish it, unless it was put to sleep
      if (++waited % PATIENCE)
        _mm_pause();
      else
        sched_yield();
      continue;
    }
    const size_t part = mine % change->parts, first = mine / change->parts * GROUP;
    const size_t rows = change->rows - first < GROUP ? change->rows - first : GROUP;
    const size_t start = change->parts > 1 ? part * PART : 0;
    const size_t end = change->parts > 1 && start + PART < change->k ? start + PART : change->k;
    multiply_rows(change, part, first, rows, start, end);
    if (atomic_fetch_add(&change->done, 1) + 1 < all) continue;
    const size_t size = change->rows * change->width;
    for (size_t other = 1; other < change->parts; other++)
      for (size_t i = 0; i < size; i++) change->low[i] += change->low[other * size + i];
    atomic_store_explicit(&change->ready, 1, memory_order_release);
  }
}

TARGET void imsm_low_rank_fetch(const ImsmLowRank* change, size_t column, size_t width) {
  const size_t size = change->half_b ? 2 : 4;
  for (size_t r = 0; r < change->rank; r++)
    for (size_t at = 0; at < width * size; at += 64)
      _mm_prefetch((const char*)change->b + (r * change->n + column) * size + at, _MM_HINT_T0);
}

// `rows` and `registers` are constants where this is inlined, so that sums stay in registers.
TARGET static inline __attribute__((always_inline)) void add(const ImsmLowRank* change, const float* low, size_t column,
                                                             size_t width, float* sums, size_t stride, const int rows,
                                                             const int registers) {
  __mmask16 lanes[2];
  __m512 all[TOGETHER][2];
  for (int i = 0; i < registers; i++) {
    lanes[i] = first_lanes(width - (size_t)i * LANES);
    for (int row = 0; row < rows; row++)
      all[row][i] = _mm512_maskz_loadu_ps(lanes[i], sums + (size_t)row * stride + i * LANES);
  }
  for (size_t r = 0; r < change->rank; r++)
    for (int i = 0; i < registers; i++) {
      const __m512 b = load(change->b, change->half_b, r * change->n + column + (size_t)i * LANES, lanes[i]);
      for (int row = 0; row < rows; row++)
        all[row][i] = _mm512_fmadd_ps(_mm512_set1_ps(low[(size_t)row * change->width + r]), b, all[row][i]);
    }
  for (int i = 0; i < registers; i++)
    for (int row = 0; row < rows; row++)
      _mm512_mask_storeu_ps(sums + (size_t)row * stride + i * LANES, lanes[i], all[row][i]);
}

// The same for `rows` changed rows that follow one another.
TARGET static void add_rows(const ImsmLowRank* change, size_t changed, size_t rows, size_t column, size_t width,
                            float* sums, size_t stride) {
  for (size_t at = 0; at < width; at += 2 * LANES) {
    const size_t left = width - at;
    for (size_t row = 0; row < rows;) {
      const float* low = change->low + (changed + row) * change->width;
      float* to = sums + row * stride + at;
      if (rows - row >= TOGETHER) {
        if (left > LANES)
          add(change, low, column + at, left, to, stride, TOGETHER, 2);
        else
          add(change, low, column + at, left, to, stride, TOGETHER, 1);
        row += TOGETHER;
      } else {
        if (left > LANES)
          add(change, low, column + at, left, to, stride, 1, 2);
        else
          add(change, low, column + at, left, to, stride, 1, 1);
        row++;
      }
    }
  }
}

TARGET void imsm_low_rank_add(const ImsmLowRank* change, size_t first, size_t rows, size_t column, size_t width,
                              float* sums, size_t stride) {
  size_t changed = 0;
  while (changed < change->rows && change->index[changed] < first) changed++;
  while (changed < change->rows && change->index[changed] < first + rows) {
    const size_t from = change->index[changed];
    size_t run = 1;
    while (changed + run < change->rows && change->index[changed + run] == from + run && from + run < first + rows)
      run++;
    add_rows(change, changed, run, column, width, sums + (from - first) * stride, stride);
    changed += run;
  }
}
