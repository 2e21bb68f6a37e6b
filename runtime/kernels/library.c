// The library that onnxruntime loads: the operators of domain "imsm", for processors that have what they need.
//
// A graph's own functions say what these operators compute; where they are not registered, onnxruntime runs those.
#include <pthread.h>

#include "checks.h"

typedef struct {
  OrtCustomOp op;  // first: onnxruntime gives its address to the functions below
  const ImsmOperator* description;
} Registered;

static const ImsmOperator* description_of(const OrtCustomOp* op) { return ((const Registered*)op)->description; }

static const char* name(const OrtCustomOp* op) { return description_of(op)->name; }
static const char* cpu_provider(const OrtCustomOp* op) { return (void)op, NULL; }
static size_t input_count(const OrtCustomOp* op) { return description_of(op)->input_count; }
static size_t output_count(const OrtCustomOp* op) { return description_of(op)->output_count; }
static ONNXTensorElementDataType input_type(const OrtCustomOp* op, size_t index) {
  return imsm_only_type(description_of(op)->inputs[index].types);
}
static ONNXTensorElementDataType output_type(const OrtCustomOp* op, size_t index) {
  return (void)op, (void)index, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
}
static OrtCustomOpInputOutputCharacteristic input_characteristic(const OrtCustomOp* op, size_t index) {
  return description_of(op)->inputs[index].optional ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
}
static OrtCustomOpInputOutputCharacteristic output_characteristic(const OrtCustomOp* op, size_t index) {
  return (void)op, (void)index, INPUT_OUTPUT_REQUIRED;
}
static OrtMemType memory_type(const OrtCustomOp* op, size_t index) { return (void)op, (void)index, OrtMemTypeDefault; }
static int first_version(const OrtCustomOp* op) { return (void)op, 1; }
static int last_version(const OrtCustomOp* op) { return (void)op, INT32_MAX; }
static OrtStatus* create(const OrtCustomOp* op, const OrtApi* ort, const OrtKernelInfo* info, void** kernel) {
  (void)ort;
  imsm_reserve_failure();
  return imsm_create(description_of(op), info, kernel);
}

static Registered registered(const ImsmOperator* description) {
  return (Registered){.description = description,
                      .op = {.version = ORT_API_VERSION,
                             .GetName = name,
                             .GetExecutionProviderType = cpu_provider,
                             .GetInputType = input_type,
                             .GetInputTypeCount = input_count,
                             .GetOutputType = output_type,
                             .GetOutputTypeCount = output_count,
                             .KernelDestroy = free,
                             .GetInputCharacteristic = input_characteristic,
                             .GetOutputCharacteristic = output_characteristic,
                             .GetInputMemoryType = memory_type,
                             .CreateKernelV2 = create,
                             .KernelComputeV2 = description->compute,
                             .GetStartVersion = first_version,
                             .GetEndVersion = last_version}};
}

// Whether there are kernels for this processor.
__attribute__((visibility("default"))) int imsm_kernels_supported(void) { return imsm_avx512_supported(); }

static OrtStatus* add_operators(const OrtApi* ort, OrtCustomOpDomain* domain) {
  static Registered all[IMSM_AVX512_OPERATORS];
  for (size_t i = 0; i < IMSM_AVX512_OPERATORS; i++) {
    all[i] = registered(imsm_avx512_operators[i]);
    IMSM_TRY(ort->CustomOpDomain_Add(domain, &all[i].op));
  }
  return NULL;
}

// Makes the domain at the first call. It lives as long as the process: sessions share it.
static OrtStatus* find_domain(const OrtApi* ort, OrtCustomOpDomain** found) {
  static OrtCustomOpDomain* domain;
  static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
  OrtStatus* status = NULL;
  pthread_mutex_lock(&lock);
  if (domain == NULL) {
    OrtCustomOpDomain* made = NULL;
    imsm_use(ort);
    status = ort->CreateCustomOpDomain("imsm", &made);
    if (status == NULL) status = add_operators(ort, made);
    if (status == NULL)
      domain = made;
    else if (made)
      ort->ReleaseCustomOpDomain(made);
  }
  *found = domain;
  pthread_mutex_unlock(&lock);
  return status;
}

__attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                                    const OrtApiBase* base) {
  const OrtApi* ort = base->GetApi(ORT_API_VERSION);
  if (ort == NULL || !imsm_kernels_supported()) return NULL;
  OrtCustomOpDomain* domain = NULL;
  IMSM_TRY(find_domain(ort, &domain));
  return ort->AddCustomOpDomain(options, domain);
}
