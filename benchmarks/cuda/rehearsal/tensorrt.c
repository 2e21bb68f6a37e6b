// TensorRT and cuDNN of the rehearsal (see cudart.c). onnxruntime lists its registered kernels only when all of its
// providers load, TensorRT's too; nothing is ever built or run with these.
#include <stddef.h>

static long zero(void) { return 0; }

// An object whose every virtual function returns 0.
static void* object(void) {
  static void* table[512];
  static void* fields[64];
  for (size_t i = 0; i < sizeof table / sizeof *table; i++) table[i] = (void*)zero;
  fields[0] = table;
  for (size_t i = 1; i < sizeof fields / sizeof *fields; i++) fields[i] = fields;
  return fields;
}

void* createInferBuilder_INTERNAL(void* logger, int version) { return object(); }
void* createInferRefitter_INTERNAL(void* engine, void* logger, int version) { return object(); }
void* createInferRuntime_INTERNAL(void* logger, int version) { return object(); }
void* createNvOnnxParser_INTERNAL(void* network, void* logger, int version) { return object(); }
void* createNvOnnxParserRefitter_INTERNAL(void* refitter, void* logger, int version) { return object(); }
void* getPluginRegistry(void) { return object(); }
int getInferLibVersion(void) { return 101300; }

int cudnnCreate(void** handle) {
  *handle = object();
  return 0;
}
int cudnnDestroy(void* handle) { return 0; }
int cudnnSetStream(void* handle, void* stream) { return 0; }
