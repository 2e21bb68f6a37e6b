// QuantizedMatMul: y = x W^T [+ bias] [+ f (x A) B] with W (N, K) in symmetric int4 blocks, as com.microsoft.MatMulNBits stores it.
//
// Activations are rounded to int8, one scale a block of 32, as accuracy_level 4 of that operator allows. Weights are read
// from where the file is mapped, in its own layout: nothing is packed when the graph is loaded.
//
// A byte of W holds an even weight in its low half and the odd one behind it in its high half, so that activations are
// stored as evens and odds too. A nibble q stands for q - 8: sum (q - 8) a = sum q a - 8 sum a, and the second sum
// depends on the activations alone: dot products start from it.
#include <immintrin.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"
#include "low_rank.h"

enum {
  BLOCK = 32,    // activations with one scale
  CHUNK = 128,   // weights in one register of 64 bytes
  FEW = 16,      // rows up to which columns are read one by one
  TILE = 256,    // rows of one tile, at most
  WIDE = 32,     // columns of one tile
  TASK = 64,     // columns of one task
  AHEAD = 4096,  // bytes of weights to fetch before they are needed, across pages, where the processor itself stops
  SCALES_AHEAD = 1024,
};

enum { X, WEIGHTS, SCALES, BIAS, ROWS, A, B };  // inputs

typedef struct {
  int64_t k, n, block_size;
} Kernel;

// A chunk of one row: lanes hold four activations each.
typedef struct {
  int8_t even[64], odd[64];
  int32_t start[16];  // -8 sum of the lane's eight activations
  float scale[16];
} Chunk;

// A block of one row.
typedef struct {
  int8_t even[16], odd[16];
  int32_t start;
  float scale;
} Block;

typedef struct {
  const Kernel* kernel;
  const float* x;
  const uint8_t* weights;
  const float* scales;
  const float* bias;
  float* y;
  size_t rows, chunks, blocks;
  size_t per_column;  // scales
  size_t bytes;       // of a column
  LowRank* change;  // NULL: none
  Chunk* few;       // (rows, chunks)
  Block* many;      // (blocks, rows)
} Call;

// Rounds up to 32 floats; returns their scale. Sums are of rounded values.
TARGET static float round_block(const float* x, size_t count, int8_t* even, int8_t* odd, int32_t* lane_sums) {
  const __mmask16 low = count >= 16 ? 0xffff : (__mmask16)((1u << count) - 1);
  const __mmask16 high = count >= 32 ? 0xffff : count <= 16 ? 0 : (__mmask16)((1u << (count - 16)) - 1);
  const __m512 a = _mm512_maskz_loadu_ps(low, x), b = _mm512_maskz_loadu_ps(high, x + 16);
  const float largest = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(a), _mm512_abs_ps(b)));
  const __m512 factor = _mm512_set1_ps(largest > 0 ? 127.0f / largest : 0.0f);
  const __m128i first = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(a, factor)));
  const __m128i second = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(b, factor)));
  const __m256i all = _mm256_set_m128i(second, first);
  // Bytes 0, 2, 4, ... and 1, 3, 5, ...
  const __m256i pairs = _mm256_permute4x64_epi64(
      _mm256_shuffle_epi8(all, _mm256_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15, 0, 2, 4, 6, 8, 10,
                                                12, 14, 1, 3, 5, 7, 9, 11, 13, 15)),
      0xd8);
  const __m128i evens = _mm256_castsi256_si128(pairs), odds = _mm256_extracti128_si256(pairs, 1);
  _mm_storeu_si128((__m128i*)even, evens);
  _mm_storeu_si128((__m128i*)odd, odds);
  const __m128i ones = _mm_set1_epi8(1);
  const __m128i sums = _mm_dpbusd_epi32(_mm_dpbusd_epi32(_mm_setzero_si128(), ones, evens), ones, odds);
  _mm_storeu_si128((__m128i*)lane_sums, sums);
  return largest / 127.0f;
}

TARGET static void round_few(void* arguments, size_t row) {
  const Call* call = arguments;
  const size_t k = (size_t)call->kernel->k;
  for (size_t chunk = 0; chunk < call->chunks; chunk++) {
    Chunk* to = call->few + row * call->chunks + chunk;
    for (size_t block = 0; block < CHUNK / BLOCK; block++) {
      const size_t start = chunk * CHUNK + block * BLOCK;
      const size_t count = start >= k ? 0 : k - start < BLOCK ? k - start : BLOCK;
      int32_t sums[4];
      const float scale = round_block(call->x + row * k + start, count, to->even + 16 * block, to->odd + 16 * block, sums);
      for (int lane = 0; lane < 4; lane++) {
        to->start[4 * block + lane] = -8 * sums[lane];
        to->scale[4 * block + lane] = scale;
      }
    }
  }
}

TARGET static void round_many(void* arguments, size_t row) {
  const Call* call = arguments;
  const size_t k = (size_t)call->kernel->k;
  for (size_t block = 0; block < call->blocks; block++) {
    Block* to = call->many + block * call->rows + row;
    const size_t start = block * BLOCK, count = k - start < BLOCK ? k - start : BLOCK;
    int32_t sums[4];
    to->scale = round_block(call->x + row * k + start, count, to->even, to->odd, sums);
    to->start = -8 * (sums[0] + sums[1] + sums[2] + sums[3]);
  }
}

// Two columns of up to four rows. `spread` puts the scale of each of the chunk's blocks into its lanes.
TARGET static inline __attribute__((always_inline)) void two_columns(const Call* call, size_t column, size_t first,
                                                                     const int rows, const int columns, __m512i spread,
                                                                     size_t scales_per_chunk) {
  const size_t bytes = call->bytes, per_column = call->per_column;
  const __m512i low = _mm512_set1_epi8(15);
  const uint8_t* weights[2];
  const float* scales[2];
  __m512 sums[2][4];
  for (int c = 0; c < columns; c++) {
    weights[c] = call->weights + (column + c) * bytes;
    scales[c] = call->scales + (column + c) * per_column;
    for (int r = 0; r < rows; r++) sums[c][r] = _mm512_setzero_ps();
  }
  for (size_t chunk = 0; chunk < call->chunks; chunk++) {
    const size_t left = bytes - chunk * 64;
    const __mmask64 there = left >= 64 ? ~0ull : (1ull << left) - 1;
    const size_t scales_left = per_column - chunk * scales_per_chunk;
    const __mmask8 known = (__mmask8)((1u << (scales_left < scales_per_chunk ? scales_left : scales_per_chunk)) - 1);
    __m512i even[2], odd[2];
    __m512 scale[2];
    for (int c = 0; c < columns; c++) {
      _mm_prefetch((const char*)(weights[c] + chunk * 64 + AHEAD), _MM_HINT_T0);
      const __m512i both = _mm512_maskz_loadu_epi8(there, weights[c] + chunk * 64);
      even[c] = _mm512_and_si512(both, low);
      odd[c] = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
      _mm_prefetch((const char*)(scales[c] + chunk * scales_per_chunk) + SCALES_AHEAD, _MM_HINT_T0);
      const __m128 few = _mm_maskz_loadu_ps(known, scales[c] + chunk * scales_per_chunk);
      scale[c] = _mm512_permutexvar_ps(spread, _mm512_castps128_ps512(few));
    }
    for (int r = 0; r < rows; r++) {
      const Chunk* x = call->few + (first + r) * call->chunks + chunk;
      const __m512i x_even = _mm512_loadu_si512(x->even), x_odd = _mm512_loadu_si512(x->odd);
      const __m512i start = _mm512_loadu_si512(x->start);
      const __m512 x_scale = _mm512_loadu_ps(x->scale);
      for (int c = 0; c < columns; c++) {
        const __m512i dot = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(start, even[c], x_even), odd[c], x_odd);
        sums[c][r] = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(dot), x_scale), scale[c], sums[c][r]);
      }
    }
  }
  const size_t n = (size_t)call->kernel->n;
  for (int c = 0; c < columns; c++)
    for (int r = 0; r < rows; r++)
      call->y[(first + r) * n + column + c] =
          _mm512_reduce_add_ps(sums[c][r]) + (call->bias ? call->bias[column + c] : 0.0f);
}

TARGET static void few_rows(void* arguments, size_t task) {
  const Call* call = arguments;
  const size_t n = (size_t)call->kernel->n, end = (task + 1) * TASK < n ? (task + 1) * TASK : n;
  const int block = (int)call->kernel->block_size;
  int32_t lanes[16];
  for (int lane = 0; lane < 16; lane++) lanes[lane] = 8 * lane / block;
  const __m512i spread = _mm512_loadu_si512(lanes);
  const size_t scales = CHUNK / (size_t)block;
  if (call->change) {
    low_rank_wait(call->change);
    low_rank_fetch(call->change, task * TASK, end - task * TASK);
  }
  for (size_t column = task * TASK; column < end; column += 2) {
    const int columns = end - column >= 2 ? 2 : 1;
    for (size_t row = 0; row < call->rows;) {
      const size_t left = call->rows - row;
#define CASE(ROWS)                                                            \
  {                                                                           \
    if (columns == 2) two_columns(call, column, row, ROWS, 2, spread, scales); \
    else two_columns(call, column, row, ROWS, 1, spread, scales);              \
    row += ROWS;                                                              \
  }
      if (left >= 4) CASE(4) else if (left == 3) CASE(3) else if (left == 2) CASE(2) else CASE(1)
#undef CASE
    }
  }
  for (size_t changed = 0; call->change && changed < call->change->rows; changed++)
    low_rank_add(call->change, changed, task * TASK, end - task * TASK,
                 call->y + call->change->index[changed] * n + task * TASK);
}

// The 32 weights of a block for 16 columns from `column` on: registers of four weights a lane, one column a lane.
TARGET static inline __attribute__((always_inline)) void unpack(const Call* call, size_t column, size_t block, __m512i even[4],
                                                                __m512i odd[4]) {
  const size_t bytes = call->bytes, last = (size_t)call->kernel->n - 1;
  __m512i rows[4];
  for (int r = 0; r < 4; r++) {
    const __m128i* parts[4];
    for (int part = 0; part < 4; part++) {
      const size_t wanted = column + 4 * (size_t)part + (size_t)r;
      parts[part] = (const __m128i*)(call->weights + (wanted < last ? wanted : last) * bytes + block * (BLOCK / 2));
    }
    rows[r] = _mm512_castsi128_si512(_mm_loadu_si128(parts[0]));
    rows[r] = _mm512_inserti32x4(rows[r], _mm_loadu_si128(parts[1]), 1);
    rows[r] = _mm512_inserti32x4(rows[r], _mm_loadu_si128(parts[2]), 2);
    rows[r] = _mm512_inserti32x4(rows[r], _mm_loadu_si128(parts[3]), 3);
  }
  const __m512i a = _mm512_unpacklo_epi32(rows[0], rows[1]), b = _mm512_unpackhi_epi32(rows[0], rows[1]);
  const __m512i c = _mm512_unpacklo_epi32(rows[2], rows[3]), d = _mm512_unpackhi_epi32(rows[2], rows[3]);
  const __m512i all[4] = {_mm512_unpacklo_epi64(a, c), _mm512_unpackhi_epi64(a, c), _mm512_unpacklo_epi64(b, d),
                          _mm512_unpackhi_epi64(b, d)};
  const __m512i low = _mm512_set1_epi8(15);
  for (int i = 0; i < 4; i++) {
    even[i] = _mm512_and_si512(all[i], low);
    odd[i] = _mm512_and_si512(_mm512_srli_epi16(all[i], 4), low);
  }
}

TARGET static inline __m512i four(const int8_t* values) {
  int32_t word;
  memcpy(&word, values, 4);
  return _mm512_set1_epi32(word);
}

// One tile of up to TILE rows and WIDE columns: every block's weights are unpacked once for all of its rows.
TARGET static void many_rows(void* arguments, size_t task) {
  const Call* call = arguments;
  const size_t n = (size_t)call->kernel->n, block_size = (size_t)call->kernel->block_size;
  const size_t column = task * WIDE, width = n - column < WIDE ? n - column : WIDE;
  const size_t per_column = call->per_column;
  float sums[TILE][WIDE], bias[WIDE] = {0};
  if (call->bias) memcpy(bias, call->bias + column, width * sizeof(float));
  if (call->change) low_rank_wait(call->change);
  size_t changed = 0;
  for (size_t first = 0; first < call->rows; first += TILE) {
    const size_t rows = call->rows - first < TILE ? call->rows - first : TILE;
    for (size_t row = 0; row < rows; row++) {
      memcpy(sums[row], bias, sizeof bias);
      if (call->change && changed < call->change->rows && call->change->index[changed] == first + row)
        low_rank_add(call->change, changed++, column, width, sums[row]);
    }
    for (size_t block = 0; block < call->blocks; block++) {
      __m512i even[2][4], odd[2][4];
      __m512 scale[2];
      float scales[WIDE];
      if (block % (64 / (BLOCK / 2)) == 0)
        for (size_t c = 0; c < width; c++) {
          _mm_prefetch((const char*)(call->weights + (column + c) * call->bytes + block * (BLOCK / 2) + 2*64), _MM_HINT_T0);
          _mm_prefetch((const char*)(call->scales + (column + c) * per_column + block * BLOCK / block_size + 8), _MM_HINT_T0);
        }
      for (size_t c = 0; c < WIDE; c++)
        scales[c] = c < width ? call->scales[(column + c) * per_column + block * BLOCK / block_size] : 0.0f;
      for (int half = 0; half < 2; half++) {
        unpack(call, column + 16 * (size_t)half, block, even[half], odd[half]);
        scale[half] = _mm512_loadu_ps(scales + 16 * half);
      }
      const Block* x = call->many + block * call->rows + first;
      for (size_t row = 0; row < rows; row++, x++) {
        __m512i dot[2] = {_mm512_set1_epi32(x->start), _mm512_set1_epi32(x->start)};
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
      memcpy(call->y + (first + row) * n + column, sums[row], width * sizeof(float));
  }
}

static OrtStatus* compute(void* op_kernel, OrtKernelContext* context) {
  const Kernel* kernel = op_kernel;
  size_t count = 0;
  Call call = {.kernel = kernel};
  call.x = input(context, X, &count, NULL);
  call.weights = input(context, WEIGHTS, NULL, NULL);
  call.scales = input(context, SCALES, NULL, NULL);
  call.bias = input(context, BIAS, NULL, NULL);
  call.y = output_like(context, 0, 0, kernel->n);
  call.rows = count / (size_t)kernel->k;
  call.per_column = ((size_t)kernel->k + (size_t)kernel->block_size - 1) / (size_t)kernel->block_size;
  call.bytes = call.per_column * (size_t)kernel->block_size / 2;
  call.blocks = ((size_t)kernel->k + BLOCK - 1) / BLOCK;
  call.chunks = ((size_t)kernel->k + CHUNK - 1) / CHUNK;
  if (call.rows == 0) return NULL;
  const int few = call.rows <= FEW;
  const size_t needed = few ? call.rows * call.chunks * sizeof(Chunk) : call.rows * call.blocks * sizeof(Block);
  void* rounded = aligned_alloc(64, (needed + 63) / 64 * 64);
  if (rounded == NULL) return failure("no memory for rounded activations");
  OrtStatus* status = NULL;
  LowRank change = {.x = call.x, .k = (size_t)kernel->k, .n = (size_t)kernel->n};
  size_t factors = 0;
  const float* factor = input(context, ROWS, &factors, NULL);
  if (factor != NULL) {
    change.a = input(context, A, NULL, &change.rank);
    change.b = input(context, B, NULL, NULL);
    change.half = is_half(context, A);
    if (factors == 0 || call.rows % factors) status = failure("QuantizedMatMulLowRank: factors do not fit the rows");
    else if (!low_rank_begin(&change, factor, factors, call.rows)) status = failure("no memory for a low-rank change");
    if (status == NULL) call.change = &change;
  }
  if (status != NULL) {
    free(rounded);
    return status;
  }
  if (few) {
    call.few = rounded;
    for (size_t row = 0; row < call.rows; row++) round_few(&call, row);
    status = parallel_for(context, few_rows, ((size_t)kernel->n + TASK - 1) / TASK, &call);
  } else {
    call.many = rounded;
    status = parallel_for(context, round_many, call.rows, &call);
    if (status == NULL) status = parallel_for(context, many_rows, ((size_t)kernel->n + WIDE - 1) / WIDE, &call);
  }
  if (call.change) low_rank_end(&change);
  free(rounded);
  return status;
}

static OrtStatus* create(const OrtCustomOp* op, const OrtApi* ort, const OrtKernelInfo* info, void** kernel) {
  (void)op, (void)ort;
  Kernel* made = malloc(sizeof *made);
  if (made == NULL) return failure("no memory for a kernel");
  made->k = attribute(info, "K", 0);
  made->n = attribute(info, "N", 0);
  made->block_size = attribute(info, "block_size", 32);
  *kernel = made;
  return NULL;
}

static const char* plain_name(const OrtCustomOp* op) { return (void)op, "QuantizedMatMul"; }
static const char* low_rank_name(const OrtCustomOp* op) { return (void)op, "QuantizedMatMulLowRank"; }
static size_t plain_inputs(const OrtCustomOp* op) { return (void)op, BIAS + 1; }
static size_t low_rank_inputs(const OrtCustomOp* op) { return (void)op, B + 1; }
static size_t outputs(const OrtCustomOp* op) { return (void)op, 1; }
static ONNXTensorElementDataType input_type(const OrtCustomOp* op, size_t index) {
  (void)op;
  if (index == A || index == B) return ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;  // float32 or float16
  return index == WEIGHTS ? ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
}
static ONNXTensorElementDataType output_type(const OrtCustomOp* op, size_t index) {
  return (void)op, (void)index, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
}
static OrtCustomOpInputOutputCharacteristic input_characteristic(const OrtCustomOp* op, size_t index) {
  return (void)op, index == BIAS ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
}
static void destroy(void* kernel) { free(kernel); }

const OrtCustomOp* quantized_matmul(void) {
  static const OrtCustomOp op = OPERATOR(plain_name, plain_inputs, outputs, input_type, output_type, input_characteristic, create, compute, destroy);
  return &op;
}

const OrtCustomOp* quantized_matmul_low_rank(void) {
  static const OrtCustomOp op = OPERATOR(low_rank_name, low_rank_inputs, outputs, input_type, output_type, input_characteristic, create, compute, destroy);
  return &op;
}
