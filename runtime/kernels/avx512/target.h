// Processors that these kernels are for: x86-64 with AVX-512 and its int8 dot products (VNNI).
#pragma once

#include <immintrin.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c,fma")))
