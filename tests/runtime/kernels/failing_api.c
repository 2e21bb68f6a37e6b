// An onnxruntime in which one call fails, or that call and all later ones, for every operator of the library.
//
// The nth call of onnxruntime's C interface, or the nth request for memory, fails: registration, creation or
// computation then has to return just that failure, and to release everything it holds. A value that a failed call did
// not give is NULL here, so that using it ends the program. Prints a line for each operator; exits with 1 on the first
// wrong answer. Linked with --wrap for malloc, calloc, realloc, aligned_alloc and free.
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "onnxruntime_c_api.h"

OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base);
int imsm_kernels_supported(void);

void* __real_malloc(size_t size);
void* __real_aligned_alloc(size_t alignment, size_t size);
void __real_free(void* memory);

#define CHECK(condition, ...)             \
  do {                                    \
    if (!(condition)) wrong(__VA_ARGS__); \
  } while (0)

static const char* running = "nothing";
static size_t calls, fail_at;  // fail_at: 0 is none
static int fail_all;           // all calls from `fail_at` on
static long held;              // pieces of memory, statuses, descriptions of shapes

__attribute__((noreturn)) static void wrong(const char* format, ...) {
  va_list values;
  va_start(values, format);
  printf("%s, call %zu%s: ", running, fail_at, fail_all ? " and all later ones" : "");
  vprintf(format, values);
  printf("\n");
  exit(1);
}

// ---- the failures

struct OrtStatus {
  OrtErrorCode code;
  char message[1024];
};
static OrtStatus* injected;  // the last failure
static int memory_failed;

static int fails(void) {
  calls++;
  return fail_at && (fail_all ? calls >= fail_at : calls == fail_at);
}

static OrtStatus* new_status(OrtErrorCode code, const char* message) {
  OrtStatus* status = __real_malloc(sizeof *status);
  status->code = code;
  snprintf(status->message, sizeof status->message, "%s", message);
  held++;
  return status;
}

static OrtStatus* injected_failure(void) { return injected = new_status(ORT_EP_FAIL, "made to fail"); }

#define MAY_FAIL() \
  if (fails()) return injected_failure()

void* __wrap_malloc(size_t size) {
  if (fails()) return memory_failed = 1, NULL;
  held++;
  return __real_malloc(size);
}
void* __wrap_aligned_alloc(size_t alignment, size_t size) {
  if (fails()) return memory_failed = 1, NULL;
  held++;
  return __real_aligned_alloc(alignment, size);
}
void* __wrap_calloc(size_t count, size_t size) {
  void* memory = __wrap_malloc(count * size);
  return memory ? memset(memory, 0, count * size) : NULL;
}
void* __wrap_realloc(void* memory, size_t size) { return (void)memory, (void)size, abort(), NULL; }
void __wrap_free(void* memory) {
  if (memory) held--;
  __real_free(memory);
}

// ---- tensors, nodes

enum { MOST_INPUTS = 16, MOST_OUTPUTS = 3, MOST_ATTRIBUTES = 8 };

struct OrtTensorTypeAndShapeInfo {
  char unused;
};
struct OrtValue {
  ONNXTensorElementDataType type;
  size_t dimensions;
  int64_t shape[4];
  void* data;
};
struct OrtKernelContext {
  size_t inputs;
  OrtValue input[MOST_INPUTS], output[MOST_OUTPUTS];
  int given[MOST_INPUTS];
};
struct OrtKernelInfo {
  struct {
    const char* name;
    int64_t integer;
    float number;
    int is_float;
  } attributes[MOST_ATTRIBUTES];
};

static OrtKernelInfo node;
static OrtKernelContext context;  // of the node

static size_t elements(const OrtValue* value) {
  size_t count = 1;
  for (size_t d = 0; d < value->dimensions; d++) count *= (size_t)value->shape[d];
  return count;
}

static size_t bytes(const OrtValue* value) {
  const int size = value->type == ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8     ? 1
                   : value->type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 ? 2
                   : value->type == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64   ? 8
                                                                          : 4;
  return elements(value) * (size_t)size;
}

// ---- onnxruntime's functions

static OrtStatus* create_status(OrtErrorCode code, const char* message) NO_EXCEPTION {
  if (fail_all && fail_at && calls >= fail_at) return NULL;  // no memory for it
  return new_status(code, message);
}
static void release_status(OrtStatus* status) NO_EXCEPTION {
  if (status == NULL) return;
  held--;
  __real_free(status);
}
static OrtErrorCode get_error_code(const OrtStatus* status) NO_EXCEPTION { return status->code; }
static OrtStatus* get_input_count(const OrtKernelContext* context, size_t* count) NO_EXCEPTION {
  MAY_FAIL();
  *count = context->inputs;
  return NULL;
}
static OrtStatus* get_input(const OrtKernelContext* context, size_t index, const OrtValue** value) NO_EXCEPTION {
  MAY_FAIL();
  CHECK(index < context->inputs, "asks for input %zu of %zu", index, context->inputs);
  *value = context->given[index] ? &context->input[index] : NULL;
  return NULL;
}
static OrtStatus* get_output(OrtKernelContext* context, size_t index, const int64_t* shape, size_t dimensions,
                             OrtValue** value) NO_EXCEPTION {
  MAY_FAIL();
  OrtValue* made = &context->output[index];
  *made = (OrtValue){.type = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, .dimensions = dimensions};
  memcpy(made->shape, shape, dimensions * sizeof *shape);
  made->data = __real_malloc(bytes(made) + 1);
  *value = made;
  return NULL;
}
static OrtStatus* get_shape(const OrtValue* value, OrtTensorTypeAndShapeInfo** info) NO_EXCEPTION {
  MAY_FAIL();
  held++;
  *info = (OrtTensorTypeAndShapeInfo*)value;
  return NULL;
}
static void release_shape(OrtTensorTypeAndShapeInfo* info) NO_EXCEPTION {
  CHECK(info != NULL, "releases no shape");
  held--;
}
static OrtStatus* get_type(const OrtTensorTypeAndShapeInfo* info, ONNXTensorElementDataType* type) NO_EXCEPTION {
  MAY_FAIL();
  *type = ((const OrtValue*)info)->type;
  return NULL;
}
static OrtStatus* get_dimensions_count(const OrtTensorTypeAndShapeInfo* info, size_t* count) NO_EXCEPTION {
  MAY_FAIL();
  *count = ((const OrtValue*)info)->dimensions;
  return NULL;
}
static OrtStatus* get_dimensions(const OrtTensorTypeAndShapeInfo* info, int64_t* shape, size_t count) NO_EXCEPTION {
  MAY_FAIL();
  memcpy(shape, ((const OrtValue*)info)->shape, count * sizeof *shape);
  return NULL;
}
static OrtStatus* get_data(OrtValue* value, void** data) NO_EXCEPTION {
  MAY_FAIL();
  *data = value->data;
  return NULL;
}
static OrtStatus* get_declared_count(const OrtKernelInfo* info, size_t* count) NO_EXCEPTION {
  MAY_FAIL();
  (void)info;
  *count = context.inputs;
  return NULL;
}
static OrtStatus* get_declared(const OrtKernelInfo* info, size_t index, OrtTypeInfo** type) NO_EXCEPTION {
  MAY_FAIL();
  (void)info;
  CHECK(index < context.inputs, "asks for the type of input %zu of %zu", index, context.inputs);
  if (!context.given[index]) return new_status(ORT_INVALID_GRAPH, "the input has no type");
  held++;
  *type = (OrtTypeInfo*)&context.input[index];
  return NULL;
}
static OrtStatus* get_tensor_type(const OrtTypeInfo* type, const OrtTensorTypeAndShapeInfo** info) NO_EXCEPTION {
  MAY_FAIL();
  *info = (const OrtTensorTypeAndShapeInfo*)type;
  return NULL;
}
static void release_type(OrtTypeInfo* type) NO_EXCEPTION {
  CHECK(type != NULL, "releases no type");
  held--;
}
static OrtStatus* get_int(const OrtKernelInfo* info, const char* name, int64_t* value) NO_EXCEPTION {
  MAY_FAIL();
  for (size_t i = 0; i < MOST_ATTRIBUTES && info->attributes[i].name; i++)
    if (strcmp(info->attributes[i].name, name) == 0 && !info->attributes[i].is_float)
      return *value = info->attributes[i].integer, NULL;
  return new_status(ORT_FAIL, "no attribute of that name and type");
}
static OrtStatus* get_float(const OrtKernelInfo* info, const char* name, float* value) NO_EXCEPTION {
  MAY_FAIL();
  for (size_t i = 0; i < MOST_ATTRIBUTES && info->attributes[i].name; i++)
    if (strcmp(info->attributes[i].name, name) == 0 && info->attributes[i].is_float)
      return *value = info->attributes[i].number, NULL;
  return new_status(ORT_FAIL, "no attribute of that name and type");
}
static OrtStatus* get_string(const OrtKernelInfo* info, const char* name, char* value, size_t* size) NO_EXCEPTION {
  MAY_FAIL();
  return (void)info, (void)name, (void)value, (void)size, new_status(ORT_FAIL, "no attribute of that name and type");
}
static OrtStatus* parallel_for(const OrtKernelContext* called, void (*task)(void*, size_t), size_t total,
                               size_t batches, void* arguments) NO_EXCEPTION {
  MAY_FAIL();
  (void)called, (void)batches;
  for (size_t i = 0; i < total; i++) task(arguments, i);
  return NULL;
}

static const OrtCustomOp* operators[16];
static size_t operator_count, domains;

static OrtStatus* create_domain(const char* name, OrtCustomOpDomain** domain) NO_EXCEPTION {
  MAY_FAIL();
  CHECK(strcmp(name, "imsm") == 0, "domain %s", name);
  operator_count = 0;
  domains++;
  *domain = (OrtCustomOpDomain*)&domains;
  return NULL;
}
static void release_domain(OrtCustomOpDomain* domain) NO_EXCEPTION {
  CHECK(domain != NULL, "releases no domain");
  domains--;
}
static OrtStatus* add_operator(OrtCustomOpDomain* domain, const OrtCustomOp* op) NO_EXCEPTION {
  MAY_FAIL();
  CHECK(domain != NULL, "adds an operator to no domain");
  operators[operator_count++] = op;
  return NULL;
}
static OrtStatus* add_domain(OrtSessionOptions* options, OrtCustomOpDomain* domain) NO_EXCEPTION {
  MAY_FAIL();
  CHECK(options != NULL && domain != NULL, "adds no domain to the session");
  return NULL;
}

static const OrtApi api = {
    .CreateStatus = create_status,
    .ReleaseStatus = release_status,
    .GetErrorCode = get_error_code,
    .KernelContext_GetInputCount = get_input_count,
    .KernelContext_GetInput = get_input,
    .KernelContext_GetOutput = get_output,
    .GetTensorTypeAndShape = get_shape,
    .ReleaseTensorTypeAndShapeInfo = release_shape,
    .GetTensorElementType = get_type,
    .GetDimensionsCount = get_dimensions_count,
    .GetDimensions = get_dimensions,
    .GetTensorMutableData = get_data,
    .KernelInfo_GetInputCount = get_declared_count,
    .KernelInfo_GetInputTypeInfo = get_declared,
    .CastTypeInfoToTensorInfo = get_tensor_type,
    .ReleaseTypeInfo = release_type,
    .KernelInfoGetAttribute_int64 = get_int,
    .KernelInfoGetAttribute_float = get_float,
    .KernelInfoGetAttribute_string = get_string,
    .KernelContext_ParallelFor = parallel_for,
    .CreateCustomOpDomain = create_domain,
    .ReleaseCustomOpDomain = release_domain,
    .CustomOpDomain_Add = add_operator,
    .AddCustomOpDomain = add_domain,
};
static const OrtApi* get_api(uint32_t version) NO_EXCEPTION { return (void)version, &api; }
static const OrtApiBase base = {.GetApi = get_api};

// ---- nodes

static void set_attribute(const char* name, int64_t integer) {
  size_t i = 0;
  while (node.attributes[i].name) i++;
  node.attributes[i].name = name;
  node.attributes[i].integer = integer;
}

static void* set_input(size_t index, ONNXTensorElementDataType type, size_t dimensions, ...) {
  OrtValue* value = &context.input[index];
  *value = (OrtValue){.type = type, .dimensions = dimensions};
  va_list sizes;
  va_start(sizes, dimensions);
  for (size_t d = 0; d < dimensions; d++) value->shape[d] = va_arg(sizes, int);
  va_end(sizes);
  value->data = __real_malloc(bytes(value) + 1);
  memset(value->data, 0, bytes(value));
  context.given[index] = 1;
  if (index >= context.inputs) context.inputs = index + 1;
  return value->data;
}

static void set_floats(float* values, size_t count) {
  for (size_t i = 0; i < count; i++) values[i] = (float)(i % 7) / 7 - 0.4f;
}

static void clear(void) {
  for (size_t i = 0; i < MOST_INPUTS; i++) __real_free(context.input[i].data);
  memset(&node, 0, sizeof node);
  memset(&context, 0, sizeof context);
}

static const ONNXTensorElementDataType F32 = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
static const ONNXTensorElementDataType U8 = ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
static const ONNXTensorElementDataType I32 = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
static const ONNXTensorElementDataType I64 = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
enum { K = 64, N = 33, RANK = 4 };

// x (rows, K), then the matrices, then factors and their matrices if the operator has a change, then the matrices' low
// bits.
static void make_product(int matrices, int low_rank, int rows) {
  set_attribute("K", K), set_attribute("N", N), set_attribute("bits", 6), set_attribute("block_size", 32);
  set_floats(set_input(0, F32, 2, rows, K), (size_t)rows * K);
  size_t at = 1;
  for (int i = 0; i < matrices; i++) {
    set_input(at++, U8, 3, N, 2, 16);
    set_floats(set_input(at++, F32, 2, N, 2), N * 2);
    set_input(at++, U8, 2, N, 2);
    set_floats(set_input(at++, F32, 1, N), N);
  }
  if (low_rank) set_floats(set_input(at++, F32, 1, rows), (size_t)rows);
  for (int i = 0; i < low_rank; i++) {
    set_floats(set_input(at++, F32, 2, K, RANK), K * RANK);
    set_floats(set_input(at++, F32, 2, RANK, N), RANK * N);
  }
  for (int i = 0; i < matrices; i++) set_input(at++, U8, 3, N, 1, 32);
}

static void make_gather(void) {
  set_attribute("bits", 6), set_attribute("block_size", 32);
  set_input(0, I64, 2, 2, 3);
  set_input(1, U8, 3, N, 2, 16);
  set_input(2, U8, 3, N, 1, 32);
  set_floats(set_input(3, F32, 2, N, 2), N * 2);
  set_input(4, U8, 2, N, 2);
}

// Two rows; the first has `known` tokens.
static void make_attention(int tokens, int known) {
  enum { HEADS = 4, KEYS = 2, SIZE = 16, HALF = 8 };
  set_attribute("num_heads", HEADS), set_attribute("kv_num_heads", KEYS), set_attribute("do_rotary", 1);
  const int width = (HEADS + 2 * KEYS) * SIZE, total = known + tokens;
  set_floats(set_input(0, F32, 3, 2, tokens, width), (size_t)(2 * tokens * width));
  for (size_t i = 3; i < 5; i++)
    set_floats(set_input(i, F32, 4, 2, KEYS, known, SIZE), (size_t)(2 * KEYS * known * SIZE));
  int32_t* lengths = set_input(5, I32, 1, 2);
  lengths[0] = total - 1, lengths[1] = tokens - 1;
  *(int32_t*)set_input(6, I32, 0) = total;
  for (size_t i = 7; i < 9; i++) set_floats(set_input(i, F32, 2, total, HALF), (size_t)(total * HALF));
  int32_t* news = set_input(9, I32, 1, 2);
  news[0] = news[1] = tokens;
}

static void make(const char* name, int large) {
  clear();
  const int rows = large ? 40 : 2;  // many rows are rounded in parallel
  if (strcmp(name, "QuantizedMatMul") == 0) make_product(1, 0, rows);
  if (strcmp(name, "QuantizedMatMulLowRank") == 0) make_product(1, 1, rows);
  if (strcmp(name, "QuantizedSwiGLU") == 0) make_product(2, 0, rows);
  if (strcmp(name, "QuantizedSwiGLULowRank") == 0) make_product(2, 2, rows);
  if (strcmp(name, "QuantizedGather") == 0) make_gather();
  if (strcmp(name, "GroupQueryAttention") == 0) {
    if (large)
      make_attention(1, 1200);  // in parts
    else
      make_attention(3, 5);
  }
  CHECK(context.inputs > 0, "the test has no node for it");
}

// ---- the test

// `status`: what was returned after a failure, if there was one. Returns whether there was one.
static int check(OrtStatus* status, long held_before) {
  const int failed = injected || memory_failed;
  CHECK(failed || status == NULL, "%s", status ? status->message : "");
  CHECK(!failed || status != NULL, "a failure is not returned");
  if (failed && !fail_all && injected) CHECK(status == injected, "another failure is returned: %s", status->message);
  if (failed && memory_failed) CHECK(strstr(status->message, "out of memory"), "%s", status->message);
  release_status(status);
  const int reserve_used = fail_all && held == held_before - 1;
  CHECK(held == held_before || reserve_used, "%ld pieces of memory are not released", held - held_before);
  injected = NULL;
  memory_failed = 0;
  return failed;
}

static OrtStatus* create_and_compute(const OrtCustomOp* op) {
  void* kernel = NULL;
  OrtStatus* status = op->CreateKernelV2(op, &api, &node, &kernel);
  if (status != NULL) return status;
  status = op->KernelComputeV2(kernel, &context);
  op->KernelDestroy(kernel);
  return status;
}

// Runs an operator without a failure, which also fills the library's reserve of one failure.
static void run_well(const OrtCustomOp* op, int large) {
  const size_t wanted = fail_at;
  fail_at = 0;
  make(op->GetName(op), large);
  OrtStatus* status = create_and_compute(op);
  CHECK(status == NULL, "%s", status->message);
  for (size_t i = 0; i < MOST_OUTPUTS; i++) __real_free(context.output[i].data);
  fail_at = wanted;
}

static int run_with_failure(const OrtCustomOp* op, int large) {
  run_well(op, large);
  make(op->GetName(op), large);
  const long before = held;
  calls = 0;
  OrtStatus* status = create_and_compute(op);
  for (size_t i = 0; i < MOST_OUTPUTS; i++) __real_free(context.output[i].data);
  return check(status, before);
}

int main(void) {
  if (!imsm_kernels_supported()) return puts("no kernels for this processor"), 77;
  OrtSessionOptions* options = (OrtSessionOptions*)&options;
  running = "RegisterCustomOps";
  for (fail_at = 1;; fail_at++) {
    calls = 0;
    if (!check(RegisterCustomOps(options, &base), 0)) break;
    CHECK(domains == (operator_count == 6), "a domain is not released");
  }
  CHECK(domains == 1 && operator_count == 6, "%zu domains, %zu operators", domains, operator_count);
  printf("%s: %zu calls\n", running, fail_at - 1);
  for (size_t i = 0; i < operator_count; i++)
    for (int large = 0; large < 2; large++) {
      running = operators[i]->GetName(operators[i]);
      for (fail_all = 0; fail_all < 2; fail_all++)
        for (fail_at = 1; run_with_failure(operators[i], large); fail_at++) continue;
      printf("%s: %zu calls\n", running, fail_at - 1);
    }
  return 0;
}
