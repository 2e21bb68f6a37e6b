// A product reads its weights from where the file is mapped, in the file's layout: nothing is packed when a graph is
// loaded. Activations have one scale for 32 of them, as accuracy_level 4 of com.microsoft.MatMulNBits allows.
//
// A byte of int4 holds an even weight in its low half and the odd one behind it in its high half, so that a block's
// activations are stored as evens and odds too; those for int8 as the first and the last sixteen. A weight q stands for
// q - 8 (int8: q - 128): sum (q - 8) a = sum q a - 8 sum a, and the second sum depends on the activations alone: dot
// products start from it, or from its like for other zero points.
//
// Few rows are bound by memory: columns are read one after the other, as they lie in the file. Many rows are bound by
// arithmetic: 32 columns' weights of one block are put into lanes once, for all rows.
#include "quantized_product.h"

#include <stdlib.h>
#include <string.h>

#include "target.h"

enum {
  BLOCK = 32,          // activations with one scale
  CHUNK = 128,         // weights that are read at once
  FEW = 16,            // rows up to which columns are read one by one
  TILE = 256,          // rows of one tile, at most
  WIDE = 32,           // columns of one tile
  TASK = 64,           // columns of one task where rows are few
  LINE = 64,           // bytes of the cache's unit
  AHEAD = 8192,        // bytes of weights to fetch before they are needed: the processor itself stops at a page's end
  SCALES_AHEAD = 512,  // scales
};

// 128 activations of one row; each lane is of eight of them.
struct Chunk {
  int8_t even[64], odd[64];
  int32_t start[16];  // -8 sum, or -128 sum
  float scale[16];
};

// 32 activations of one row.
struct Block {
  int8_t even[16], odd[16];
  int32_t start;  // -8 sum, or -128 sum
  float scale;
};

// A matrix and the place of a task in it.
typedef struct {
  const Activations* x;
  const QuantizedMatrix* matrix;
  size_t per_column;   // scales
  size_t bytes;        // of a column
  size_t zeros_bytes;  // of a column's zero points
  float* y;
} Product;

// By how many bits the middle of what `bits` hold is larger than 1.
static inline int middle(int bits) { return bits == 4 ? 3 : 7; }

// Rounds up to 32 floats; returns their scale. Sums are of rounded values.
TARGET static float round_block(const float* x, size_t count, int bits, int8_t* even, int8_t* odd, int32_t* lane_sums) {
  const __mmask16 low = count >= 16 ? 0xffff : (__mmask16)((1u << count) - 1);
  const __mmask16 high = count >= 32 ? 0xffff : count <= 16 ? 0 : (__mmask16)((1u << (count - 16)) - 1);
  const __m512 a = _mm512_maskz_loadu_ps(low, x), b = _mm512_maskz_loadu_ps(high, x + 16);
  const float largest = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(a), _mm512_abs_ps(b)));
  const __m512 factor = _mm512_set1_ps(largest > 0 ? 127.0f / largest : 0.0f);
  const __m128i first = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(a, factor)));
  const __m128i second = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(b, factor)));
  const __m256i all = _mm256_set_m128i(second, first);
  // Bytes 0, 2, 4, ... and 1, 3, 5, ...
  const __m256i pairs =
      bits == 8 ? all
                : _mm256_permute4x64_epi64(
                      _mm256_shuffle_epi8(all, _mm256_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15, 0,
                                                                2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15)),
                      0xd8);
  const __m128i evens = _mm256_castsi256_si128(pairs), odds = _mm256_extracti128_si256(pairs, 1);
  _mm_storeu_si128((__m128i*)even, evens);
  _mm_storeu_si128((__m128i*)odd, odds);
  const __m128i ones = _mm_set1_epi8(1);
  const __m128i sums = _mm_dpbusd_epi32(_mm_dpbusd_epi32(_mm_setzero_si128(), ones, evens), ones, odds);
  _mm_storeu_si128((__m128i*)lane_sums, sums);
  return largest / 127.0f;
}

TARGET static void round_by_chunk(const Activations* activations, size_t row) {
  const size_t k = activations->k;
  for (size_t chunk = 0; chunk < activations->chunks; chunk++) {
    Chunk* to = activations->by_chunk + row * activations->chunks + chunk;
    for (size_t block = 0; block < CHUNK / BLOCK; block++) {
      const size_t start = chunk * CHUNK + block * BLOCK;
      const size_t count = start >= k ? 0 : k - start < BLOCK ? k - start : BLOCK;
      int32_t sums[4];
      const float scale = round_block(activations->x + row * k + start, count, activations->bits, to->even + 16 * block,
                                      to->odd + 16 * block, sums);
      for (int lane = 0; lane < 4; lane++) {
        to->start[4 * block + lane] = -sums[lane] * (1 << middle(activations->bits));
        to->scale[4 * block + lane] = scale;
      }
    }
  }
}

TARGET static void round_by_block(void* arguments, size_t row) {
  const Activations* activations = arguments;
  const size_t k = activations->k;
  for (size_t block = 0; block < activations->blocks; block++) {
    Block* to = activations->by_block + block * activations->rows + row;
    const size_t start = block * BLOCK, count = k - start < BLOCK ? k - start : BLOCK;
    int32_t sums[4];
    to->scale = round_block(activations->x + row * k + start, count, activations->bits, to->even, to->odd, sums);
    to->start = -(sums[0] + sums[1] + sums[2] + sums[3]) * (1 << middle(activations->bits));
  }
}

// Up to four scales, or their first `count` ones.
TARGET static inline __m128 load_scales(const QuantizedMatrix* matrix, size_t at, __mmask8 known) {
  if (matrix->half) return _mm_cvtph_ps(_mm_maskz_loadu_epi16(known, (const uint16_t*)matrix->scales + at));
  return _mm_maskz_loadu_ps(known, (const float*)matrix->scales + at);
}

static inline __mmask64 first_bytes(size_t count) { return count >= 64 ? ~0ull : (1ull << count) - 1; }

static inline const char* scale_address(const QuantizedMatrix* matrix, size_t at) {
  return (const char*)matrix->scales + at * (matrix->half ? 2 : 4);
}

// Up to four zero points of a column.
TARGET static inline __m128i load_zeros(const Product* product, size_t column, size_t at, size_t count,
                                        const int bits) {
  const uint8_t* zeros = product->matrix->zeros + column * product->zeros_bytes;
  int32_t found[4] = {0};
  for (size_t i = at; i < at + count; i++) found[i - at] = bits == 8 ? zeros[i] : zeros[i / 2] >> 4 * (i % 2) & 15;
  return _mm_loadu_si128((const __m128i*)found);
}

// One or two columns of up to four rows. `spread` puts the scale of each of the chunk's blocks into its lanes.
TARGET static inline __attribute__((always_inline)) void two_columns(const Product* product, size_t column,
                                                                     size_t first, const int rows, const int columns,
                                                                     const int bits, const int zeros, __m512i spread,
                                                                     size_t scales_per_chunk) {
  const Activations* activations = product->x;
  const QuantizedMatrix* matrix = product->matrix;
  const size_t bytes = product->bytes, per_column = product->per_column;
  const __m512i low = _mm512_set1_epi8(15);
  const uint8_t* weights[2];
  size_t scales[2];
  __m512 sums[2][4];
  for (int c = 0; c < columns; c++) {
    weights[c] = matrix->weights + (column + c) * bytes;
    scales[c] = (column + c) * per_column;
    for (int r = 0; r < rows; r++) sums[c][r] = _mm512_setzero_ps();
  }
  const size_t step = CHUNK * (size_t)bits / 8, last = activations->chunks - 1;
  const size_t last_bytes = bytes - last * step, last_scales = per_column - last * scales_per_chunk;
  for (size_t chunk = 0; chunk <= last; chunk++) {
    const size_t left = chunk < last ? step : last_bytes;
    const size_t scales_here = chunk < last ? scales_per_chunk : last_scales;
    const __mmask8 known = (__mmask8)((1u << scales_here) - 1);
    __m512i even[2], odd[2], zero[2];
    __m512 scale[2];
    for (int c = 0; c < columns; c++) {
      const size_t at = scales[c] + chunk * scales_per_chunk;
      if (first == 0) {
        for (size_t line = 0; line < step; line += LINE)
          _mm_prefetch((const char*)weights[c] + chunk * step + line + AHEAD, _MM_HINT_T0);
        _mm_prefetch(scale_address(matrix, at + SCALES_AHEAD), _MM_HINT_T0);
      }
      const __m512i both = _mm512_maskz_loadu_epi8(first_bytes(left), weights[c] + chunk * step);
      if (bits == 4) {
        even[c] = _mm512_and_si512(both, low);
        odd[c] = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
      } else {  // the first sixteen of the four blocks, and the last
        const size_t more = left > 64 ? left - 64 : 0;
        const __m512i next = _mm512_maskz_loadu_epi8(first_bytes(more), weights[c] + chunk * step + (more ? 64 : 0));
        even[c] = _mm512_shuffle_i64x2(both, next, 0x88);
        odd[c] = _mm512_shuffle_i64x2(both, next, 0xdd);
      }
      if (zeros)
        zero[c] = _mm512_permutexvar_epi32(
            spread,
            _mm512_castsi128_si512(load_zeros(product, column + c, chunk * scales_per_chunk, scales_here, bits)));
      scale[c] = _mm512_permutexvar_ps(spread, _mm512_castps128_ps512(load_scales(matrix, at, known)));
    }
    for (int r = 0; r < rows; r++) {
      const Chunk* x = activations->by_chunk + (first + r) * activations->chunks + chunk;
      const __m512i x_even = _mm512_loadu_si512(x->even), x_odd = _mm512_loadu_si512(x->odd);
      const __m512i start = _mm512_loadu_si512(x->start);
      const __m512 x_scale = _mm512_loadu_ps(x->scale);
      for (int c = 0; c < columns; c++) {
        const __m512i from = zeros ? _mm512_mullo_epi32(_mm512_srai_epi32(start, middle(bits)), zero[c]) : start;
        const __m512i dot = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(from, even[c], x_even), odd[c], x_odd);
        sums[c][r] = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(dot), x_scale), scale[c], sums[c][r]);
      }
    }
  }
  for (int c = 0; c < columns; c++)
    for (int r = 0; r < rows; r++)
      product->y[(first + r) * matrix->n + column + c] =
          _mm512_reduce_add_ps(sums[c][r]) + (matrix->bias ? matrix->bias[column + c] : 0.0f);
}

TARGET static inline __attribute__((always_inline)) void few_rows(const Product* product, size_t first, size_t columns,
                                                                  const int bits, const int zeros) {
  const QuantizedMatrix* matrix = product->matrix;
  const size_t end = first + columns, rows = product->x->rows;
  int32_t lanes[16];
  for (int lane = 0; lane < 16; lane++) lanes[lane] = 8 * lane / (int)matrix->block_size;
  const __m512i spread = _mm512_loadu_si512(lanes);
  const size_t scales = CHUNK / matrix->block_size;
  if (matrix->change) {
    low_rank_wait(matrix->change);
    low_rank_fetch(matrix->change, first, columns);
  }
  // All columns for four rows at a time, so that those stay in the nearest cache.
  for (size_t row = 0; row < rows; row += 4) {
    const size_t left = rows - row;
#define ROWS(COUNT)                                                             \
  for (size_t column = first; column < end; column += 2) {                      \
    if (end - column >= 2)                                                      \
      two_columns(product, column, row, COUNT, 2, bits, zeros, spread, scales); \
    else                                                                        \
      two_columns(product, column, row, COUNT, 1, bits, zeros, spread, scales); \
  }
    if (left >= 4) {
      ROWS(4)
    } else if (left == 3) {
      ROWS(3)
    } else if (left == 2) {
      ROWS(2)
    } else {
      ROWS(1)
    }
#undef ROWS
  }
  if (matrix->change) low_rank_add(matrix->change, 0, rows, first, columns, product->y + first, matrix->n);
}

// Sixteen bytes of each of 16 columns from `column` on: registers of four bytes a lane, one column a lane.
TARGET static inline __attribute__((always_inline)) void gather(const Product* product, size_t column, size_t offset,
                                                                __m512i lanes[4]) {
  const size_t last = product->matrix->n - 1;
  __m512i rows[4];
  for (size_t r = 0; r < 4; r++) {
    const __m128i* parts[4];
    for (size_t part = 0; part < 4; part++) {
      const size_t wanted = column + 4 * part + r < last ? column + 4 * part + r : last;
      parts[part] = (const __m128i*)(product->matrix->weights + wanted * product->bytes + offset);
    }
    rows[r] = _mm512_castsi128_si512(_mm_loadu_si128(parts[0]));
    rows[r] = _mm512_inserti32x4(rows[r], _mm_loadu_si128(parts[1]), 1);
    rows[r] = _mm512_inserti32x4(rows[r], _mm_loadu_si128(parts[2]), 2);
    rows[r] = _mm512_inserti32x4(rows[r], _mm_loadu_si128(parts[3]), 3);
  }
  const __m512i a = _mm512_unpacklo_epi32(rows[0], rows[1]), b = _mm512_unpackhi_epi32(rows[0], rows[1]);
  const __m512i c = _mm512_unpacklo_epi32(rows[2], rows[3]), d = _mm512_unpackhi_epi32(rows[2], rows[3]);
  lanes[0] = _mm512_unpacklo_epi64(a, c), lanes[1] = _mm512_unpackhi_epi64(a, c);
  lanes[2] = _mm512_unpacklo_epi64(b, d), lanes[3] = _mm512_unpackhi_epi64(b, d);
}

// The 32 weights of a block for 16 columns from `column` on.
TARGET static inline __attribute__((always_inline)) void unpack(const Product* product, size_t column, size_t block,
                                                                const int bits, __m512i even[4], __m512i odd[4]) {
  const size_t offset = block * BLOCK * (size_t)bits / 8;
  gather(product, column, offset, even);
  if (bits == 8) {
    gather(product, column, offset + BLOCK / 2, odd);
    return;
  }
  const __m512i low = _mm512_set1_epi8(15);
  for (int i = 0; i < 4; i++) {
    odd[i] = _mm512_and_si512(_mm512_srli_epi16(even[i], 4), low);
    even[i] = _mm512_and_si512(even[i], low);
  }
}

// The zero points of a block for `columns` columns.
TARGET static inline void block_zeros(const Product* product, size_t first, size_t columns, size_t block,
                                      const int bits, __m512i zeros[2]) {
  const size_t at = block * BLOCK / product->matrix->block_size;
  int32_t found[WIDE] = {0};
  for (size_t c = 0; c < columns; c++) found[c] = _mm_cvtsi128_si32(load_zeros(product, first + c, at, 1, bits));
  for (int half = 0; half < 2; half++) zeros[half] = _mm512_loadu_si512(found + 16 * half);
}

// The scales of a block for `columns` columns, zero for the others.
TARGET static inline void block_scales(const Product* product, size_t first, size_t columns, size_t block,
                                       __m512 scales[2]) {
  const QuantizedMatrix* matrix = product->matrix;
  const size_t at = first * product->per_column + block * BLOCK / matrix->block_size;
  if (matrix->half) {
    uint16_t found[WIDE] = {0};
    for (size_t c = 0; c < columns; c++) found[c] = ((const uint16_t*)matrix->scales)[at + c * product->per_column];
    for (int half = 0; half < 2; half++)
      scales[half] = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(found + 16 * half)));
  } else {
    float found[WIDE] = {0};
    for (size_t c = 0; c < columns; c++) found[c] = ((const float*)matrix->scales)[at + c * product->per_column];
    for (int half = 0; half < 2; half++) scales[half] = _mm512_loadu_ps(found + 16 * half);
  }
}

TARGET static inline __m512i four(const int8_t* values) {
  int32_t word;
  memcpy(&word, values, 4);
  return _mm512_set1_epi32(word);
}

TARGET static inline __attribute__((always_inline)) void many_rows(const Product* product, size_t column,
                                                                   size_t columns, const int bits, const int zeros) {
  const size_t block_bytes = BLOCK * (size_t)bits / 8;
  const Activations* activations = product->x;
  const QuantizedMatrix* matrix = product->matrix;
  float sums[TILE][WIDE], bias[WIDE] = {0};
  if (matrix->bias) memcpy(bias, matrix->bias + column, columns * sizeof(float));
  if (matrix->change) low_rank_wait(matrix->change);
  for (size_t first = 0; first < activations->rows; first += TILE) {
    const size_t rows = activations->rows - first < TILE ? activations->rows - first : TILE;
    for (size_t row = 0; row < rows; row++) memcpy(sums[row], bias, sizeof bias);
    if (matrix->change) low_rank_add(matrix->change, first, rows, column, columns, sums[0], WIDE);
    for (size_t block = 0; block < activations->blocks; block++) {
      __m512i even[2][4], odd[2][4], zero[2];
      __m512 scale[2];
      if (block * block_bytes % LINE == 0)
        for (size_t c = 0; c < columns; c++) {
          const size_t at = (column + c) * product->per_column + block * BLOCK / matrix->block_size;
          _mm_prefetch((const char*)matrix->weights + (column + c) * product->bytes + block * block_bytes + 2 * LINE,
                       _MM_HINT_T0);
          _mm_prefetch(scale_address(matrix, at + 8), _MM_HINT_T0);
        }
      for (size_t half = 0; half < 2; half++) unpack(product, column + 16 * half, block, bits, even[half], odd[half]);
      block_scales(product, column, columns, block, scale);
      if (zeros) block_zeros(product, column, columns, block, bits, zero);
      const Block* x = activations->by_block + block * activations->rows + first;
      for (size_t row = 0; row < rows; row++, x++) {
        __m512i dot[2] = {_mm512_set1_epi32(x->start), _mm512_set1_epi32(x->start)};
        if (zeros)
          for (int half = 0; half < 2; half++)
            dot[half] = _mm512_mullo_epi32(_mm512_set1_epi32(x->start >> middle(bits)), zero[half]);
        for (int i = 0; i < 4; i++) {
          const __m512i x_even = four(x->even + 4 * i), x_odd = four(x->odd + 4 * i);
          for (int half = 0; half < 2; half++) {
            dot[half] = _mm512_dpbusd_epi32(dot[half], even[half][i], x_even);
            dot[half] = _mm512_dpbusd_epi32(dot[half], odd[half][i], x_odd);
          }
        }
        const __m512 x_scale = _mm512_set1_ps(x->scale);
        for (int half = 0; half < 2; half++) {
          float* sum = sums[row] + 16 * half;
          const __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(dot[half]), x_scale);
          _mm512_storeu_ps(sum, _mm512_fmadd_ps(value, scale[half], _mm512_loadu_ps(sum)));
        }
      }
    }
    for (size_t row = 0; row < rows; row++)
      memcpy(product->y + (first + row) * matrix->n + column, sums[row], columns * sizeof(float));
  }
}

OrtStatus* product_create(const OrtCustomOp* op, const OrtApi* ort, const OrtKernelInfo* info, void** kernel) {
  (void)op, (void)ort;
  ProductKernel* made = malloc(sizeof *made);
  if (made == NULL) return failure("no memory for a kernel");
  made->k = (size_t)attribute(info, "K", 0);
  made->n = (size_t)attribute(info, "N", 0);
  made->block_size = (size_t)attribute(info, "block_size", 0);
  made->bits = (int)attribute(info, "bits", 0);
  *kernel = made;
  const int blocks = made->block_size == 32 || made->block_size == 64 || made->block_size == 128;
  if (made->k && made->n && blocks && (made->bits == 4 || made->bits == 8)) return NULL;
  free(made);
  return failure("a product with attributes that the kernel has not: K, N, bits 4 or 8, block_size 32, 64 or 128");
}

OrtStatus* product_matrix(const OrtKernelContext* context, const ProductKernel* kernel, size_t index,
                          QuantizedMatrix* to) {
  size_t weights = 0, scales = 0, zeros = 0, bias = 0;
  *to = (QuantizedMatrix){.weights = input(context, index, &weights, NULL),
                          .scales = input(context, index + 1, &scales, NULL),
                          .zeros = input(context, index + 2, &zeros, NULL),
                          .bias = input(context, index + 3, &bias, NULL),
                          .half = is_half(context, index + 1),
                          .n = kernel->n,
                          .block_size = kernel->block_size};
  const size_t blocks = (kernel->k + kernel->block_size - 1) / kernel->block_size, bits = (size_t)kernel->bits;
  const int fits = weights == kernel->n * blocks * kernel->block_size * bits / 8 && scales == kernel->n * blocks &&
                   (to->zeros == NULL || zeros == kernel->n * ((blocks * bits + 7) / 8)) &&
                   (to->bias == NULL || bias == kernel->n);
  return fits ? NULL : failure("a product whose weights, scales, zero points or bias have not the size of K and N");
}

OrtStatus* product_input(const OrtKernelContext* context, const ProductKernel* kernel, size_t index, const float** x,
                         size_t* rows) {
  size_t count = 0, last = 0;
  *x = input(context, index, &count, &last);
  *rows = count / kernel->k;
  return last == kernel->k ? NULL : failure("a product whose input has not K columns");
}

OrtStatus* product_begin(const OrtKernelContext* context, const float* x, size_t rows, size_t k, int bits,
                         Activations* to) {
  *to = (Activations){.x = x, .rows = rows, .k = k, .bits = bits};
  to->blocks = (k + BLOCK - 1) / BLOCK;
  to->chunks = (k + CHUNK - 1) / CHUNK;
  const size_t needed = rows <= FEW ? rows * to->chunks * sizeof(Chunk) : rows * to->blocks * sizeof(Block);
  void* rounded = aligned_alloc(LINE, (needed + LINE - 1) / LINE * LINE);
  if (rounded == NULL) return failure("no memory for rounded activations");
  if (rows <= FEW) {
    to->by_chunk = rounded;
    for (size_t row = 0; row < rows; row++) round_by_chunk(to, row);
    return NULL;
  }
  to->by_block = rounded;
  return parallel_for(context, round_by_block, rows, to);
}

void product_end(Activations* activations) {
  free(activations->by_chunk);
  free(activations->by_block);
}

#define VARIANT(ROWS, BITS, ZEROS)                                                                   \
  TARGET static void ROWS##_##BITS##_##ZEROS(const Product* product, size_t first, size_t columns) { \
    ROWS(product, first, columns, BITS, ZEROS);                                                      \
  }
VARIANT(few_rows, 4, 0)
VARIANT(few_rows, 4, 1)
VARIANT(few_rows, 8, 0)
VARIANT(few_rows, 8, 1)
VARIANT(many_rows, 4, 0)
VARIANT(many_rows, 4, 1)
VARIANT(many_rows, 8, 0)
VARIANT(many_rows, 8, 1)
static void (*const VARIANTS[2][2][2])(const Product*, size_t, size_t) = {
    {{few_rows_4_0, few_rows_4_1}, {few_rows_8_0, few_rows_8_1}},
    {{many_rows_4_0, many_rows_4_1}, {many_rows_8_0, many_rows_8_1}},
};

static size_t columns_of_a_task(const Activations* activations) { return activations->by_chunk ? TASK : WIDE; }

size_t product_tasks(const Activations* activations, size_t n) {
  const size_t columns = columns_of_a_task(activations);
  return (n + columns - 1) / columns;
}

void product_columns(const Activations* activations, const QuantizedMatrix* matrix, float* y, size_t task,
                     size_t* first, size_t* columns) {
  Product product = {.x = activations, .matrix = matrix, .y = y};
  product.per_column = (activations->k + matrix->block_size - 1) / matrix->block_size;
  product.bytes = product.per_column * matrix->block_size * (size_t)activations->bits / 8;
  product.zeros_bytes = (product.per_column * (size_t)activations->bits + 7) / 8;
  const size_t most = columns_of_a_task(activations);
  *first = task * most;
  *columns = matrix->n - *first < most ? matrix->n - *first : most;
  VARIANTS[activations->by_chunk == NULL][activations->bits == 8][matrix->zeros != NULL](&product, *first, *columns);
}
