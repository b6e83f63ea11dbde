#include "optimizer.h"

#include <algorithm>

#include "parallel.h"

namespace leangpt::train {
namespace {

// Elements that a thread takes at a time, the same parts on any number of threads.
constexpr int64_t kPart = 1 << 14;

struct Part {
  size_t tensor;
  int64_t first, size;
};

template <class Tensor>
std::vector<Part> parts_of(const std::vector<Tensor>& tensors) {
  std::vector<Part> parts;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const int64_t size = tensors[i].size;
    for (int64_t first = 0; first < size; first += kPart) {
      parts.push_back({i, first, std::min(kPart, size - first)});
    }
  }
  return parts;
}

const void* at(const void* data, Dtype dtype, int64_t element) {
  return static_cast<const uint8_t*>(data) + element * size_of(dtype);
}

}  // namespace

void adamw(const AdamW& step, const std::vector<AdamWPart>& tensors) {
  const std::vector<Part> parts = parts_of(tensors);
  parallel_for(static_cast<int64_t>(parts.size()), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Part& part = parts[i];
      AdamWPart elements = tensors[part.tensor];
      elements.param = const_cast<void*>(at(elements.param, elements.dtype, part.first));
      elements.grad = at(elements.grad, elements.grad_dtype, part.first);
      elements.exp_avg += part.first;
      elements.exp_avg_sq += part.first;
      if (elements.master) elements.master += part.first;
      elements.size = part.size;
      kernels().adamw(step, elements);
    }
  });
}

double sum_squares(const std::vector<Elements>& tensors) {
  const std::vector<Part> parts = parts_of(tensors);
  std::vector<double> sums(parts.size());
  parallel_for(static_cast<int64_t>(parts.size()), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Elements& tensor = tensors[parts[i].tensor];
      const void* first = at(tensor.data, tensor.dtype, parts[i].first);
      sums[i] = kernels().sum_squares(first, tensor.dtype, parts[i].size);
    }
  });
  double total = 0;
  for (const double sum : sums) total += sum;
  return total;
}

}  // namespace leangpt::train
