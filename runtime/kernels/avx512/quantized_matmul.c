// QuantizedMatMul: y = x W^T [+ bias] [+ f (x A) B] with W in blocks of int4 or int8.
#include <stdlib.h>

#include "quantized_product.h"

enum { X, WEIGHTS, SCALES, ZEROS, BIAS, ROWS, A, B };  // inputs

typedef struct {
  Activations x;
  QuantizedMatrix matrix;
  float* y;
} Call;

static void columns_task(void* arguments, size_t task) {
  const Call* call = arguments;
  size_t first, columns;
  product_columns(&call->x, &call->matrix, call->y, task, &first, &columns);
}

static OrtStatus* compute(void* op_kernel, OrtKernelContext* context) {
  const ProductKernel* kernel = op_kernel;
  Call call = {0};
  LowRank change = {0};
  const float* x = NULL;
  size_t rows = 0;
  OrtStatus* status = product_input(context, kernel, X, &x, &rows);
  if (status == NULL) status = product_matrix(context, kernel, WEIGHTS, &call.matrix);
  if (status != NULL) return status;
  call.y = output_like(context, 0, X, (int64_t)kernel->n);
  if (rows == 0) return NULL;
  status = low_rank_begin(&change, context, ROWS, A, x, rows, kernel->k, kernel->n);
  if (change.low != NULL) call.matrix.change = &change;
  if (status == NULL) status = product_begin(context, x, rows, kernel->k, kernel->bits, &call.x);
  if (status == NULL) status = parallel_for(context, columns_task, product_tasks(&call.x, kernel->n), &call);
  product_end(&call.x);
  low_rank_end(&change);
  return status;
}

static const char* plain_name(const OrtCustomOp* op) { return (void)op, "QuantizedMatMul"; }
static const char* low_rank_name(const OrtCustomOp* op) { return (void)op, "QuantizedMatMulLowRank"; }
static size_t plain_inputs(const OrtCustomOp* op) { return (void)op, BIAS + 1; }
static size_t low_rank_inputs(const OrtCustomOp* op) { return (void)op, B + 1; }
static size_t outputs(const OrtCustomOp* op) { return (void)op, 1; }
static ONNXTensorElementDataType input_type(const OrtCustomOp* op, size_t index) {
  (void)op;
  if (index == WEIGHTS || index == ZEROS) return ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
  const int any = index == SCALES || index == A || index == B;  // float32 or float16
  return any ? ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
}
static OrtCustomOpInputOutputCharacteristic input_characteristic(const OrtCustomOp* op, size_t index) {
  return (void)op, index == ZEROS || index == BIAS ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
}

const OrtCustomOp* quantized_matmul(void) {
  static const OrtCustomOp op =
      OPERATOR(plain_name, plain_inputs, outputs, input_type, input_characteristic, product_create, compute);
  return &op;
}

const OrtCustomOp* quantized_matmul_low_rank(void) {
  static const OrtCustomOp op =
      OPERATOR(low_rank_name, low_rank_inputs, outputs, input_type, input_characteristic, product_create, compute);
  return &op;
}
