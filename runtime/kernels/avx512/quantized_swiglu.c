// QuantizedSwiGLU: y = silu(x G^T [+ ...]) * (x U^T [+ ...]), both products as in QuantizedMatMul (SwiGLU, arXiv
// 2002.05202).
#include <stdlib.h>

#include "quantized_product.h"
#include "vector_math.h"

enum { X, GATE, UP = GATE + 4, ROWS = UP + 4, A_GATE, A_UP = A_GATE + 2, INPUTS = A_UP + 2 };  // inputs

typedef struct {
  Activations x;
  QuantizedMatrix gate, up;
  float *y, *other;  // (rows, n)
} Call;

TARGET static void columns_task(void* arguments, size_t task) {
  const Call* call = arguments;
  size_t first, columns;
  product_columns(&call->x, &call->gate, call->y, task, &first, &columns);
  product_columns(&call->x, &call->up, call->other, task, &first, &columns);
  for (size_t row = 0; row < call->x.rows; row++) {
    float* gate = call->y + row * call->gate.n + first;
    const float* up = call->other + row * call->gate.n + first;
    for (size_t c = 0; c < columns; c += 16) {
      const __mmask16 lanes = columns - c >= 16 ? 0xffff : (__mmask16)((1u << (columns - c)) - 1);
      const __m512 value =
          _mm512_mul_ps(silu(_mm512_maskz_loadu_ps(lanes, gate + c)), _mm512_maskz_loadu_ps(lanes, up + c));
      _mm512_mask_storeu_ps(gate + c, lanes, value);
    }
  }
}

static OrtStatus* compute(void* op_kernel, OrtKernelContext* context) {
  const ProductKernel* kernel = op_kernel;
  Call call = {0};
  LowRank gate = {0}, up = {0};
  const float* x = NULL;
  size_t rows = 0;
  OrtStatus* status = product_input(context, kernel, X, &x, &rows);
  if (status == NULL) status = product_matrix(context, kernel, GATE, &call.gate);
  if (status == NULL) status = product_matrix(context, kernel, UP, &call.up);
  if (status != NULL) return status;
  call.y = output_like(context, 0, X, (int64_t)kernel->n);
  if (rows == 0) return NULL;
  call.other = malloc(rows * kernel->n * sizeof(float));
  if (call.other == NULL) return failure("no memory for a product");
  status = low_rank_begin(&gate, context, ROWS, A_GATE, x, rows, kernel->k, kernel->n);
  if (status == NULL) status = low_rank_begin(&up, context, ROWS, A_UP, x, rows, kernel->k, kernel->n);
  if (gate.low != NULL) call.gate.change = &gate;
  if (up.low != NULL) call.up.change = &up;
  if (status == NULL) status = product_begin(context, x, rows, kernel->k, kernel->bits, &call.x);
  if (status == NULL) status = parallel_for(context, columns_task, product_tasks(&call.x, kernel->n), &call);
  product_end(&call.x);
  low_rank_end(&gate);
  low_rank_end(&up);
  free(call.other);
  return status;
}

static const char* plain_name(const OrtCustomOp* op) { return (void)op, "QuantizedSwiGLU"; }
static const char* low_rank_name(const OrtCustomOp* op) { return (void)op, "QuantizedSwiGLULowRank"; }
static size_t plain_inputs(const OrtCustomOp* op) { return (void)op, ROWS; }
static size_t low_rank_inputs(const OrtCustomOp* op) { return (void)op, INPUTS; }
static size_t outputs(const OrtCustomOp* op) { return (void)op, 1; }
static ONNXTensorElementDataType input_type(const OrtCustomOp* op, size_t index) {
  (void)op;
  if (index == GATE || index == UP || index == GATE + 2 || index == UP + 2) return ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
  const int any = index == GATE + 1 || index == UP + 1 || index > ROWS;  // float32 or float16
  return any ? ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
}
static OrtCustomOpInputOutputCharacteristic input_characteristic(const OrtCustomOp* op, size_t index) {
  const int optional = index == GATE + 2 || index == GATE + 3 || index == UP + 2 || index == UP + 3;
  return (void)op, optional ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
}

const OrtCustomOp* quantized_swiglu(void) {
  static const OrtCustomOp op =
      OPERATOR(plain_name, plain_inputs, outputs, input_type, input_characteristic, product_create, compute);
  return &op;
}

const OrtCustomOp* quantized_swiglu_low_rank(void) {
  static const OrtCustomOp op =
      OPERATOR(low_rank_name, low_rank_inputs, outputs, input_type, input_characteristic, product_create, compute);
  return &op;
}
