// What the kernels share: what one reads and writes in a call. checks.h is how an operator is described.
//
// This folder holds what is the same for every instruction set. The folder of an instruction set, avx512/, holds whole
// operators, one file each, with the arithmetic that they share: what an operator accepts (sizes of heads, of blocks)
// depends on what its arithmetic can read.
//
// A function that can fail returns NULL or the failure, which the caller returns or releases.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

#include "onnxruntime_c_api.h"

// Returns from the calling function with the failure of `call`, if it fails.
#define IMSM_TRY(call)                           \
  do {                                           \
    OrtStatus* const imsm_try_status = (call);   \
    if (imsm_try_status) return imsm_try_status; \
  } while (0)

enum { IMSM_MOST_DIMENSIONS = 8, IMSM_ALIGNMENT = 64 };

// An input.
typedef struct {
  const void* data;
  int given;  // 0: it is left out, and the rest is zero
  ONNXTensorElementDataType type;
  size_t dimensions, count;  // count: of elements
  size_t shape[IMSM_MOST_DIMENSIONS];
} ImsmTensor;

// A failure with a message in printf's format. Never NULL.
OrtStatus* imsm_failure(const char* format, ...) __attribute__((format(printf, 1, 2), returns_nonnull));

// Finds an input. One with more than IMSM_MOST_DIMENSIONS dimensions has no shape.
OrtStatus* imsm_find_input(const OrtKernelContext* context, size_t index, ImsmTensor* input);

// Makes an output of float32.
OrtStatus* imsm_output(OrtKernelContext* context, size_t index, const size_t* shape, size_t dimensions, float** values);

// An attribute of a node; `otherwise` where the node has none of that name. Fails where it has another type.
OrtStatus* imsm_int_attribute(const OrtKernelInfo* info, const char* name, int64_t otherwise, int64_t* value);
OrtStatus* imsm_float_attribute(const OrtKernelInfo* info, const char* name, float otherwise, float* value);

// The types that a node's first `count` inputs are declared with; UNDEFINED for those that are left out.
OrtStatus* imsm_declared_types(const OrtKernelInfo* info, size_t count, ONNXTensorElementDataType* types);

// a b, or SIZE_MAX where that is too large: no tensor has so many elements, and no memory so many bytes.
static inline size_t imsm_times(size_t a, size_t b) {
  size_t product;
  return __builtin_mul_overflow(a, b, &product) ? SIZE_MAX : product;
}

// Memory for `count` elements of `size` bytes, aligned to IMSM_ALIGNMENT; release it with free().
OrtStatus* imsm_allocate(size_t count, size_t size, void** memory);

// A function that a thread of the session's pool runs for one of `total` indices.
typedef void (*ImsmTask)(void* arguments, size_t index);

// Runs `task` for 0 .. total - 1 in the session's pool of threads.
OrtStatus* imsm_parallel_for(const OrtKernelContext* context, ImsmTask task, size_t total, void* arguments);

typedef struct ImsmOperator ImsmOperator;  // checks.h

// The operators for x86-64 with AVX-512 VNNI, and whether this processor has that.
enum { IMSM_AVX512_OPERATORS = 6 };
extern const ImsmOperator* const imsm_avx512_operators[IMSM_AVX512_OPERATORS];
int imsm_avx512_supported(void);

// Gives imsm_* the interface of the onnxruntime that has loaded the library.
void imsm_use(const OrtApi* api);

// Keeps a failure in reserve, for imsm_failure to return when there is no memory for another one.
void imsm_reserve_failure(void);
