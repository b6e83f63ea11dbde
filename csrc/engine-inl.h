// The part of the C interface that both decode engines have: how errors are told, and the functions
// of a decoder. Whoever includes it has defined in namespace leangpt the `Decoder`, and `Turn`,
// which a call holds while it computes.
//
// A function returns 0, or the kind of an error whose message leangpt_error() tells.
#include <cstdint>
#include <exception>
#include <new>
#include <stdexcept>
#include <string>

#include "adapter.h"
#include "batch.h"
#include "draw.h"

#define LEANGPT_EXPORT extern "C" __attribute__((visibility("default")))

using namespace leangpt;

namespace {

enum Status : int { kOk = 0, kInvalid = 1, kCacheFull = 2, kFailed = 3 };

thread_local std::string error;

template <class F>
int guarded(const F& f) {
  try {
    f();
    return kOk;
  } catch (const CacheFull& e) {
    error = e.what();
    return kCacheFull;
  } catch (const std::invalid_argument& e) {
    error = e.what();
    return kInvalid;
  } catch (const std::bad_alloc&) {
    error = "out of memory";
    return kFailed;
  } catch (const std::exception& e) {
    error = e.what();
    return kFailed;
  }
}

template <class F>
int guarded_work(const F& f) {
  return guarded([&] {
    [[maybe_unused]] const Turn turn{};
    f();
  });
}

}  // namespace

LEANGPT_EXPORT const char* leangpt_error() { return error.c_str(); }

LEANGPT_EXPORT int leangpt_kv_block_size() { return KvBlocks::kBlockSize; }

LEANGPT_EXPORT void leangpt_decoder_delete(Decoder* decoder) { delete decoder; }

LEANGPT_EXPORT int64_t leangpt_add_sequence(Decoder* decoder) { return decoder->blocks().add(); }

LEANGPT_EXPORT int leangpt_add_adapter(Decoder* decoder, const LayerDeltas* layers,
                                       int32_t* number) {
  return guarded_work([&] { *number = decoder->add_adapter(layers); });
}

// leangpt_add_sequence with a prefix, an adapter, or both.
LEANGPT_EXPORT int leangpt_add_adapted_sequence(Decoder* decoder, const float* keys,
                                                const float* values, int64_t prefix,
                                                int32_t adapter, int64_t* sequence) {
  return guarded_work([&] { *sequence = decoder->add_sequence(keys, values, prefix, adapter); });
}

LEANGPT_EXPORT int leangpt_fork(Decoder* decoder, int64_t sequence, int64_t* copy) {
  return guarded([&] { *copy = decoder->blocks().fork(sequence); });
}

LEANGPT_EXPORT int leangpt_truncate(Decoder* decoder, int64_t sequence, int64_t length) {
  return guarded([&] { decoder->blocks().truncate(sequence, length); });
}

LEANGPT_EXPORT int leangpt_drop(Decoder* decoder, int64_t sequence) {
  return guarded([&] { decoder->blocks().drop(sequence); });
}

LEANGPT_EXPORT int32_t leangpt_free_blocks(Decoder* decoder) {
  return decoder->blocks().free_blocks();
}

LEANGPT_EXPORT int leangpt_hidden(Decoder* decoder, const Batch* batch, float* out) {
  return guarded_work([&] { decoder->hidden(*batch, out); });
}

LEANGPT_EXPORT int leangpt_logits(Decoder* decoder, const Batch* batch, float* out) {
  return guarded_work([&] { decoder->logits(*batch, out); });
}

LEANGPT_EXPORT int leangpt_logprobs(Decoder* decoder, const Batch* batch, const int64_t* targets,
                                    float* out) {
  return guarded_work([&] { decoder->logprobs(*batch, targets, out); });
}

LEANGPT_EXPORT int leangpt_sample(Decoder* decoder, const Batch* batch,
                                  const DrawSettings* settings, Drawn* out) {
  return guarded_work([&] { decoder->sample(*batch, settings, out); });
}
