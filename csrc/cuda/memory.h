// What the decoder owns of a device: a stream, memory, and host memory that is copied
// asynchronously.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>

namespace leangpt::cuda {

// Throws std::runtime_error, or std::bad_alloc where memory has run out.
inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // or the next launch would be blamed for it
  if (status == cudaErrorMemoryAllocation) throw std::bad_alloc();
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// The device is current until the guard's end.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~DeviceGuard() { cudaSetDevice(before_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
};

// A stream of the device that is current when it is created.
class Stream {
 public:
  Stream() = default;
  ~Stream() {
    if (stream_) cudaStreamDestroy(stream_);
  }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  void create() {
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreate");
  }
  operator cudaStream_t() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

// A point in a stream's work that the host can wait for.
class Event {
 public:
  Event() = default;
  ~Event() {
    if (event_) cudaEventDestroy(event_);
  }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;

  void record(cudaStream_t stream) {
    if (!event_) {
      check(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming), "cudaEventCreate");
    }
    check(cudaEventRecord(event_, stream), "cudaEventRecord");
  }
  void wait() const { check(cudaEventSynchronize(event_), "running a step"); }

 private:
  cudaEvent_t event_ = nullptr;
};

// Bytes on the device that grow and are kept; zero where they were never written.
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  DeviceBuffer(DeviceBuffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  DeviceBuffer& operator=(DeviceBuffer&&) = delete;
  ~DeviceBuffer() { cudaFree(data_); }

  // What was there is lost where it has to grow; whether that happened.
  bool reserve(int64_t bytes) {
    if (bytes <= bytes_) return false;
    // waits for a step that is on its way
    check(cudaFree(std::exchange(data_, nullptr)), "cudaFree");
    bytes_ = 0;
    check(cudaMalloc(&data_, bytes), "cudaMalloc");
    bytes_ = bytes;
    check(cudaMemset(data_, 0, bytes), "cudaMemset");
    // streams that do not wait for the default one might write there before it is done
    check(cudaStreamSynchronize(nullptr), "cudaMemset");
    return true;
  }

  // As reserve, but what the work of a stream has left there is kept.
  bool extend(int64_t bytes, cudaStream_t stream) {
    if (bytes <= bytes_) return false;
    DeviceBuffer larger;
    larger.reserve(bytes);
    if (data_) {
      check(cudaMemcpyAsync(larger.data_, data_, bytes_, cudaMemcpyDeviceToDevice, stream),
            "cudaMemcpyAsync");
    }
    std::swap(data_, larger.data_);
    std::swap(bytes_, larger.bytes_);
    return true;
  }

  template <class T = uint8_t>
  T* at(int64_t offset_bytes = 0) const {
    return reinterpret_cast<T*>(static_cast<uint8_t*>(data_) + offset_bytes);
  }

 private:
  void* data_ = nullptr;
  int64_t bytes_ = 0;
};

// Bytes of the host that stay where they are while the device reads or writes them.
class PinnedBuffer {
 public:
  PinnedBuffer() = default;
  PinnedBuffer(const PinnedBuffer&) = delete;
  PinnedBuffer& operator=(const PinnedBuffer&) = delete;
  ~PinnedBuffer() { cudaFreeHost(data_); }

  void reserve(int64_t bytes) {
    if (bytes <= bytes_) return;
    check(cudaFreeHost(std::exchange(data_, nullptr)), "cudaFreeHost");
    bytes_ = 0;
    check(cudaMallocHost(&data_, bytes), "cudaMallocHost");
    bytes_ = bytes;
  }

  template <class T = uint8_t>
  T* at(int64_t offset_bytes = 0) const {
    return reinterpret_cast<T*>(static_cast<uint8_t*>(data_) + offset_bytes);
  }

 private:
  void* data_ = nullptr;
  int64_t bytes_ = 0;
};

}  // namespace leangpt::cuda
