// QuantizedGather: rows of a matrix in blocks of 5 or 6 bits, by their numbers.
#include "operators.h"
#include "quantized_product.h"
#include "target.h"

enum { IDS, WEIGHTS, MORE, SCALES, ZEROS, INPUTS };
enum { LINES, TOKENS, N, BLOCKS, BLOCK_BYTES, GROUPS, GROUP_BYTES, SIZES };
enum { BITS, BLOCK_SIZE, ATTRIBUTES };

typedef struct {
  size_t block_size;
  int bits;
} Kernel;

static OrtStatus* create(const ImsmOperator* operator, const OrtKernelInfo* info, const int64_t* attributes,
                         void** kernel) {
  (void)operator, (void)info;
  IMSM_TRY(imsm_allocate(1, sizeof(Kernel), kernel));
  *(Kernel*)*kernel = (Kernel){.block_size = (size_t)attributes[BLOCK_SIZE], .bits = (int)attributes[BITS]};
  return NULL;
}

// 32 weights from number `first` of a row on: of each the four high bits and the others, as quantized_product.h
// describes them.
TARGET static void unpack(const uint8_t* weights, const uint8_t* more, size_t first, int extra, float zero, float scale,
                          float* y) {
  const size_t bytes = 8 * (size_t)extra;
  const uint8_t* group = more + first / IMSM_CHUNK * 2 * bytes;
  for (size_t i = 0; i < IMSM_BLOCK / 2; i++) {
    const size_t number = first % IMSM_CHUNK / 2 + i, field = number / bytes;
    for (size_t odd = 0; odd < 2; odd++) {
      const int low = group[odd * bytes + number % bytes] >> (size_t)extra * field & ((1 << extra) - 1);
      const int code = (weights[i] >> 4 * odd & 15) << extra | low;
      y[2 * i + odd] = ((float)code - zero) * scale;
    }
  }
}

TARGET static float scale_of(const ImsmTensor* scales, size_t at) {
  if (scales->type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16) return _cvtsh_ss(((const uint16_t*)scales->data)[at]);
  return ((const float*)scales->data)[at];
}

static OrtStatus* compute(void* kernel, OrtKernelContext* context) {
  const Kernel* node = kernel;
  const int extra = imsm_extra(node->bits);
  const size_t group_bytes = IMSM_CHUNK * (size_t)extra / 8;
  ImsmInputs inputs = imsm_inputs(&imsm_quantized_gather, context);
  inputs.sizes[BLOCK_BYTES] = node->block_size / 2;
  inputs.sizes[GROUP_BYTES] = group_bytes;
  ImsmTensor ids, weights, more, scales, zeros;
  IMSM_TRY(imsm_read(&inputs, IDS, &ids));
  IMSM_TRY(imsm_read(&inputs, WEIGHTS, &weights));
  const size_t n = inputs.sizes[N], blocks = inputs.sizes[BLOCKS];
  const size_t width = blocks * node->block_size, more_bytes = (width + IMSM_CHUNK - 1) / IMSM_CHUNK * group_bytes;
  inputs.sizes[GROUPS] = (width + IMSM_CHUNK - 1) / IMSM_CHUNK;
  IMSM_TRY(imsm_read(&inputs, MORE, &more));
  IMSM_TRY(imsm_read(&inputs, SCALES, &scales));
  IMSM_TRY(imsm_read(&inputs, ZEROS, &zeros));
  ImsmTensor like = ids;
  if (like.dimensions == IMSM_MOST_DIMENSIONS)
    return imsm_failure("QuantizedGather: ids has %zu dimensions; it may have %d", ids.dimensions,
                        IMSM_MOST_DIMENSIONS - 1);
  like.shape[like.dimensions++] = width;
  float* y;
  IMSM_TRY(imsm_output(context, 0, like.shape, like.dimensions, &y));
  for (size_t row = 0; row < ids.count; row++) {
    const int64_t id = ((const int64_t*)ids.data)[row];
    if (id < 0 || (uint64_t)id >= n)
      return imsm_failure("QuantizedGather: ids is %lld in row %zu; it must be below N %zu and not negative",
                          (long long)id, row, n);
    const uint8_t* low = (const uint8_t*)more.data + (size_t)id * more_bytes;
    for (size_t first = 0; first < width; first += IMSM_BLOCK, y += IMSM_BLOCK) {
      const size_t at = (size_t)id * width + first, block = at / node->block_size;
      const float zero = zeros.given ? ((const uint8_t*)zeros.data)[block] : (float)(1 << imsm_middle(node->bits));
      unpack((const uint8_t*)weights.data + at / 2, low, first, extra, zero, scale_of(&scales, block), y);
    }
  }
  return NULL;
}

static const char* const sizes[SIZES] = {
    [LINES] = "rows",
    [TOKENS] = "tokens",
    [N] = "N",
    [BLOCKS] = "blocks",
    [BLOCK_BYTES] = "bytes of a block",
    [GROUPS] = "groups of 128",
    [GROUP_BYTES] = "bytes of a group",
};
static const ImsmAttribute attributes[ATTRIBUTES] = {
    [BITS] = {"bits", .allowed = {5, 6}},
    [BLOCK_SIZE] = {"block_size", .allowed = {32, 64, 128}},
};
static const ImsmInput inputs[INPUTS] = {
    [IDS] = {"ids", IMSM_INT64, IMSM_LINES, 2, {LINES, TOKENS}},
    [WEIGHTS] = {"weights", IMSM_UINT8, IMSM_SHAPE, 3, {N, BLOCKS, BLOCK_BYTES}},
    [MORE] = {"more", IMSM_UINT8, IMSM_SHAPE, 3, {N, GROUPS, GROUP_BYTES}},
    [SCALES] = {"scales", IMSM_FLOAT32 | IMSM_FLOAT16, IMSM_SHAPE, 2, {N, BLOCKS}},
    [ZEROS] = {"zero_points", IMSM_UINT8, IMSM_SHAPE, 2, {N, BLOCKS}, .optional = 1},
};

const ImsmOperator imsm_quantized_gather = {.name = "QuantizedGather",
                                            .attributes = attributes,
                                            .attribute_count = ATTRIBUTES,
                                            .inputs = inputs,
                                            .input_count = INPUTS,
                                            .sizes = sizes,
                                            .output_count = 1,
                                            .create = create,
                                            .compute = compute};
