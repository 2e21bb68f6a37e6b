// GroupQueryAttention: the operator of com.microsoft for float32 caches that are continued in place, without biases.
#include <math.h>
#include <string.h>

#include "attention.h"
#include "operators.h"

enum { QUERY, KEY, VALUE, PAST_KEY, PAST_VALUE, SEQLENS_K, TOTAL, COS, SIN, QUERY_SEQLENS, INPUTS };
enum { Y, PRESENT_KEY, PRESENT_VALUE, OUTPUTS };

enum { NUM_HEADS, KV_NUM_HEADS, DO_ROTARY, ROTARY_INTERLEAVED, LOCAL_WINDOW_SIZE, ATTRIBUTES };

static const ImsmAttribute attributes[ATTRIBUTES] = {
    [NUM_HEADS] = {"num_heads", .least = 1, .most = INT32_MAX},
    [KV_NUM_HEADS] = {"kv_num_heads", .least = 1, .most = INT32_MAX},
    [DO_ROTARY] = {"do_rotary", .least = 0, .most = 1},
    [ROTARY_INTERLEAVED] = {"rotary_interleaved", .least = 0, .most = 1},
    [LOCAL_WINDOW_SIZE] = {"local_window_size", .otherwise = -1, .least = -1, .most = INT32_MAX},
};

enum { ROWS, TOKENS, WIDTH, KV_WIDTH, KV_HEADS, POSITIONS, HEAD_SIZE, TABLE_POSITIONS, HALF, SIZES };

static const char* const sizes[SIZES] = {
    [ROWS] = "rows",
    [TOKENS] = "tokens",
    [WIDTH] = "width",
    [KV_WIDTH] = "width",
    [KV_HEADS] = "kv_num_heads",
    [POSITIONS] = "positions",
    [HEAD_SIZE] = "head size",
    [TABLE_POSITIONS] = "positions",
    [HALF] = "half of the rotated part",
};

static const ImsmInput inputs_table[INPUTS] = {
    [QUERY] = {"query", IMSM_FLOAT32, IMSM_SHAPE, 3, {ROWS, TOKENS, WIDTH}},
    [KEY] = {"key", IMSM_FLOAT32, IMSM_SHAPE, 3, {ROWS, TOKENS, KV_WIDTH}, .optional = 1},
    [VALUE] = {"value", IMSM_FLOAT32, IMSM_SHAPE, 3, {ROWS, TOKENS, KV_WIDTH}, .optional = 1},
    [PAST_KEY] = {"past_key", IMSM_FLOAT32, IMSM_SHAPE, 4, {ROWS, KV_HEADS, POSITIONS, HEAD_SIZE}},
    [PAST_VALUE] = {"past_value", IMSM_FLOAT32, IMSM_SHAPE, 4, {ROWS, KV_HEADS, POSITIONS, HEAD_SIZE}},
    [SEQLENS_K] = {"seqlens_k", IMSM_INT32, IMSM_ELEMENTS, 1, {ROWS}},
    [TOTAL] = {"total", IMSM_INT32, IMSM_ELEMENTS, 0},
    [COS] = {"cos", IMSM_FLOAT32, IMSM_SHAPE, 2, {TABLE_POSITIONS, HALF}, .optional = 1},
    [SIN] = {"sin", IMSM_FLOAT32, IMSM_SHAPE, 2, {TABLE_POSITIONS, HALF}, .optional = 1},
    [QUERY_SEQLENS] = {"query_seqlens", IMSM_INT32, IMSM_ELEMENTS, 1, {ROWS}},
};

typedef struct {
  const ImsmOperator* operator;
  size_t heads, kv_heads, window;
  float scale;  // 0: by the size of a head
  int rotary, interleaved;
} Kernel;

static OrtStatus* create(const ImsmOperator* operator, const OrtKernelInfo* info, const int64_t* values,
                         void** kernel) {
  Kernel found = {.operator = operator,
                  .heads = (size_t)values[NUM_HEADS],
                  .kv_heads = (size_t)values[KV_NUM_HEADS],
                  .window = values[LOCAL_WINDOW_SIZE] > 0 ? (size_t)values[LOCAL_WINDOW_SIZE] : 0,
                  .rotary = (int)values[DO_ROTARY],
                  .interleaved = (int)values[ROTARY_INTERLEAVED]};
  IMSM_TRY(imsm_float_attribute(info, "scale", 0.0f, &found.scale));
  if (!isfinite(found.scale)) return imsm_failure("%s: scale is %g; it must be finite", operator->name, found.scale);
  if (found.heads % found.kv_heads)
    return imsm_failure("%s: num_heads is %zu; it must be a multiple of kv_num_heads %zu", operator->name, found.heads,
                        found.kv_heads);
  IMSM_TRY(imsm_allocate(1, sizeof found, kernel));
  *(Kernel*)*kernel = found;
  return NULL;
}

// The new tokens, their queries, keys and values apart or all in one tensor.
static OrtStatus* read_tokens(ImsmInputs* inputs, ImsmAttention* to) {
  ImsmTensor query, key, value;
  size_t* const size = inputs->sizes;
  const size_t kv_width = to->kv_heads * to->size, queries_width = to->heads * to->size;
  size[KV_WIDTH] = kv_width;
  IMSM_TRY(imsm_read(inputs, KEY, &key));
  IMSM_TRY(imsm_read(inputs, VALUE, &value));
  if (key.given != value.given)
    return imsm_failure("%s: %s is missing; key and value must be given both, or neither", inputs->operator->name,
                        key.given ? "value" : "key");
  size[WIDTH] = queries_width + (key.given ? 0 : 2 * kv_width);
  IMSM_TRY(imsm_read(inputs, QUERY, &query));
  to->tokens = size[TOKENS];
  to->query = query.data;
  to->query_stride = size[WIDTH];
  to->key = key.given ? key.data : to->query + queries_width;
  to->value = key.given ? value.data : to->query + queries_width + kv_width;
  to->kv_stride = key.given ? kv_width : size[WIDTH];
  return NULL;
}

static OrtStatus* read_tables(ImsmInputs* inputs, ImsmAttention* to) {
  ImsmTensor cos, sin;
  IMSM_TRY(imsm_read_needed(inputs, COS, &cos));
  IMSM_TRY(imsm_read_needed(inputs, SIN, &sin));
  to->cos = cos.data;
  to->sin = sin.data;
  to->half = inputs->sizes[HALF];
  if (to->half <= to->size / 2) return NULL;
  return imsm_failure("%s: cos is (%zu, %zu); it must have at most %zu columns, half of the head size",
                      inputs->operator->name, inputs->sizes[TABLE_POSITIONS], to->half, to->size / 2);
}

// How many tokens each row has after this step and how many of them are new; the caches grow to `total` if they are
// shorter.
static OrtStatus* read_lengths(ImsmInputs* inputs, ImsmAttention* to) {
  const char* name = inputs->operator->name;
  const size_t past = inputs->sizes[POSITIONS], positions = inputs->sizes[TABLE_POSITIONS];
  ImsmTensor lengths, news, total;
  IMSM_TRY(imsm_read(inputs, SEQLENS_K, &lengths));
  IMSM_TRY(imsm_read(inputs, TOTAL, &total));
  IMSM_TRY(imsm_read(inputs, QUERY_SEQLENS, &news));
  const int32_t wanted = *(const int32_t*)total.data;
  if (wanted < 0) return imsm_failure("%s: total is %d; it must be 0 or more", name, wanted);
  to->lengths = lengths.data;
  to->news = news.data;
  to->capacity = (size_t)wanted > past ? (size_t)wanted : past;
  for (size_t row = 0; row < to->rows; row++) {
    const int64_t known = (int64_t)to->lengths[row] + 1, fresh = to->news[row];
    if (fresh < 0 || fresh > (int64_t)to->tokens)
      return imsm_failure("%s: query_seqlens is %lld for row %zu; it must be 0 to the tokens of the step, %zu", name,
                          (long long)fresh, row, to->tokens);
    const int64_t room = (int64_t)to->capacity, old = (int64_t)past + fresh, most = room < old ? room : old;
    if (known < fresh || known > most)
      return imsm_failure(
          "%s: seqlens_k is %lld for row %zu; it must be %lld to %lld, as %lld tokens are new, past_key "
          "holds %zu and total is %d",
          name, (long long)known - 1, row, (long long)fresh - 1, (long long)most - 1, (long long)fresh, past, wanted);
    if (to->rotary && (size_t)known > positions)
      return imsm_failure("%s: seqlens_k is %lld for row %zu; it must be below the %zu positions of cos and sin", name,
                          (long long)known - 1, row, positions);
  }
  return NULL;
}

// Copies a cache that is not continued in place.
static void copy_cache(const ImsmAttention* call, float* to, const ImsmTensor* past) {
  const size_t floats = past->shape[2] * call->size;
  if (to == past->data || floats == 0) return;
  for (size_t at = 0; at < call->rows * call->kv_heads; at++)
    memcpy(to + at * call->capacity * call->size, (const float*)past->data + at * floats, floats * sizeof(float));
}

static OrtStatus* compute(void* op_kernel, OrtKernelContext* context) {
  const Kernel* kernel = op_kernel;
  ImsmAttention call = {.heads = kernel->heads,
                        .kv_heads = kernel->kv_heads,
                        .group = kernel->heads / kernel->kv_heads,
                        .window = kernel->window,
                        .rotary = kernel->rotary,
                        .interleaved = kernel->interleaved};
  ImsmInputs inputs = imsm_inputs(kernel->operator, context);
  ImsmTensor past_key, past_value;
  inputs.sizes[KV_HEADS] = kernel->kv_heads;
  IMSM_TRY(imsm_read(&inputs, PAST_KEY, &past_key));
  IMSM_TRY(imsm_read(&inputs, PAST_VALUE, &past_value));
  call.rows = inputs.sizes[ROWS];
  call.size = inputs.sizes[HEAD_SIZE];
  if (call.size == 0 || call.size % IMSM_HEAD_STEP || call.size > IMSM_LARGEST_HEAD)
    return imsm_failure("%s: the head size is %zu; it must be a multiple of %d up to %d", kernel->operator->name,
                        call.size, IMSM_HEAD_STEP, IMSM_LARGEST_HEAD);
  call.scale = kernel->scale != 0 ? kernel->scale : 1 / sqrtf((float)call.size);
  IMSM_TRY(read_tokens(&inputs, &call));
  if (call.rotary) IMSM_TRY(read_tables(&inputs, &call));
  IMSM_TRY(read_lengths(&inputs, &call));
  const size_t y_shape[3] = {call.rows, call.tokens, call.heads * call.size};
  const size_t shape[4] = {call.rows, call.kv_heads, call.capacity, call.size};
  IMSM_TRY(imsm_output(context, Y, y_shape, 3, &call.y));
  IMSM_TRY(imsm_output(context, PRESENT_KEY, shape, 4, &call.keys));
  IMSM_TRY(imsm_output(context, PRESENT_VALUE, shape, 4, &call.values));
  copy_cache(&call, call.keys, &past_key);
  copy_cache(&call, call.values, &past_value);
  return call.rows && call.tokens ? imsm_attention(&call, context) : NULL;
}

const ImsmOperator imsm_group_query_attention = {.name = "GroupQueryAttention",
                                                 .attributes = attributes,
                                                 .attribute_count = ATTRIBUTES,
                                                 .inputs = inputs_table,
                                                 .input_count = INPUTS,
                                                 .sizes = sizes,
                                                 .output_count = OUTPUTS,
                                                 .create = create,
                                                 .compute = compute};
