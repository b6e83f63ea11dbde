// The C interface of the CUDA decode engine, for kernels/decode.py: a decoder's functions
// (engine-inl.h), and what there is of devices. It holds the CUDA runtime, and can be loaded where
// there is neither a GPU nor a driver.
#include "cuda/decoder.h"

namespace leangpt {

using Decoder = cuda::Decoder;

// Decoders share nothing: no call waits for another.
struct Turn {};

}  // namespace leangpt

#include "engine-inl.h"

// Fails where the engine cannot run on a device, with the reason.
LEANGPT_EXPORT int leangpt_check_device(int device) {
  return guarded([&] { cuda::check_device(device); });
}

// What pages take of a device's memory, and what it has free.
LEANGPT_EXPORT int leangpt_cache_memory(const ModelConfig* config, int kv_kind, int device,
                                        int64_t* block_bytes, int64_t* free_bytes) {
  return guarded([&] {
    const auto kind = static_cast<cuda::KvKind>(kv_kind);
    *block_bytes =
        config->n_layer * cuda::kv_block_bytes(config->n_kv_head, config->head_dim, kind);
    *free_bytes = cuda::free_memory(device);
  });
}

LEANGPT_EXPORT int leangpt_decoder_new(const Model* model, int kv_kind, int32_t num_blocks,
                                       int device, int has_graphs, Decoder** decoder) {
  return guarded([&] {
    *decoder = new Decoder(*model, static_cast<cuda::KvKind>(kv_kind), num_blocks, device,
                           has_graphs != 0);
  });
}

// leangpt_sample in two parts: see cuda::Decoder.
LEANGPT_EXPORT int leangpt_start_sample(Decoder* decoder, const Batch* batch,
                                        const DrawSettings* settings) {
  return guarded_work([&] { decoder->start_sample(*batch, settings); });
}

LEANGPT_EXPORT int leangpt_take_draws(Decoder* decoder, const DrawSettings* settings, Drawn* out) {
  return guarded_work([&] { decoder->take_draws(settings, out); });
}

LEANGPT_EXPORT void leangpt_use_library(Decoder* decoder, cuda::LibraryProduct product) {
  decoder->use_library(product);
}

LEANGPT_EXPORT int leangpt_num_graphs(Decoder* decoder) { return decoder->num_graphs(); }
