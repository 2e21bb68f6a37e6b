// The operators that have kernels for AVX-512 VNNI.
#include "operators.h"

const ImsmOperator* const imsm_avx512_operators[IMSM_AVX512_OPERATORS] = {
    &imsm_quantized_matmul,          &imsm_quantized_matmul_low_rank, &imsm_quantized_swiglu,
    &imsm_quantized_swiglu_low_rank, &imsm_quantized_gather,          &imsm_group_query_attention,
};

int imsm_avx512_supported(void) {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("f16c");
}
