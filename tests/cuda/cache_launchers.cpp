// The launchers of the cache and of attention, for ctypes: what they throw is returned.
#include "../../csrc/cuda/kernels.h"
#include "message_of.h"

using namespace leangpt;
using namespace leangpt::cuda;

extern "C" {

int64_t call_kv_block_bytes(const HeadShape* shape, KvKind kind) {
  return kv_block_bytes(shape->n_kv_head, shape->head_dim, kind);
}

const char* call_rotary_angles(const int32_t* positions, const float* frequencies, float magnitude,
                               int head_dim, float* rotations, int num_rows) {
  return message_of([&] {
    rotary_angles(positions, frequencies, magnitude, head_dim, rotations, num_rows, nullptr);
  });
}

const char* call_append_kv(const AppendArgs* args, const HeadShape* shape, const StepRows* rows,
                           const KvLayer* layer) {
  return message_of([&] { append_kv(*args, *shape, *rows, *layer, nullptr); });
}

const char* call_write_prefix(const Prefix* prefix, const HeadShape* shape,
                              const int32_t* block_table, const KvLayer* layer,
                              int64_t layer_bytes) {
  return message_of(
      [&] { write_prefix(*prefix, *shape, block_table, *layer, layer_bytes, nullptr); });
}

const char* call_copy_pages(uint8_t* base, int64_t layer_bytes, int n_layer, int64_t block_bytes,
                            const int32_t* copies, int num_copies) {
  return message_of(
      [&] { copy_pages(base, layer_bytes, n_layer, block_bytes, copies, num_copies, nullptr); });
}

int call_attention_tile_rows(const HeadShape* shape) { return attention_tile_rows(*shape); }

int64_t call_attention_scratch_floats(const HeadShape* shape, int num_rows, int max_keys) {
  return attention_scratch_floats(*shape, num_rows, max_keys);
}

const char* call_attention_decode(const AttentionArgs* args, const HeadShape* shape,
                                  const StepRows* rows, const KvLayer* layer) {
  return message_of([&] { attention_decode(*args, *shape, *rows, *layer, nullptr); });
}
}
