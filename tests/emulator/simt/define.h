// How handlers are written: a function of one lane's values becomes an instruction for all lanes.
// It is called for lanes that are not active too, whose values may be anything, and must not trap.
#pragma once
#include <tuple>
#include <type_traits>
#include <utility>

#include "machine.h"

namespace simt {

// The type of an operand in a signature: integers are bits.
template <class T>
constexpr const char* type_name() {
  if (std::is_same_v<T, bool>) return "pred";
  if (std::is_floating_point_v<T>) return sizeof(T) == 4 ? "f32" : "f64";
  return sizeof(T) == 1 ? "b8" : sizeof(T) == 2 ? "b16" : sizeof(T) == 4 ? "b32" : "b64";
}

// The name that PTX has for the type, in opcodes: "s32".
template <class T>
std::string suffix() {
  if (std::is_same_v<T, bool>) return "pred";
  const char* kind = std::is_floating_point_v<T> ? "f" : std::is_signed_v<T> ? "s" : "u";
  return kind + std::to_string(8 * sizeof(T));
}

// The values become the register's in the lanes of the mask.
template <class T>
inline void assign(T* registers, const T* values, Mask lanes) {
  if (lanes == kAllLanes) {
    std::memcpy(registers, values, kWarpSize * sizeof(T));
  } else {
    for (; lanes; lanes &= lanes - 1)
      registers[__builtin_ctz(lanes)] = values[__builtin_ctz(lanes)];
  }
}

template <class F>
const F* kept = nullptr;  // functions have no state; C++17 cannot construct them from their type

template <class F, class Result, class... Args>
struct Lanes {
  static void run(Warp& warp, const Instruction& i, Mask lanes) {
    run(warp, i, lanes, std::index_sequence_for<Args...>());
  }

  template <size_t... n>
  static void run(Warp& warp, const Instruction& i, Mask lanes, std::index_sequence<n...>) {
    const std::tuple<const Args*...> args{warp.reg<Args>(i.operands[n + 1])...};
    alignas(64) Result results[kWarpSize];
    for (int l = 0; l < kWarpSize; ++l) results[l] = (*kept<F>)(std::get<n>(args)[l]...);
    assign(warp.reg<Result>(i.operands[0]), results, lanes);
  }
};

// One result and its arguments, by their types.
void add_instruction(const std::string& name, std::initializer_list<const char*> types,
                     Handler run);

template <class Signature>
struct Definition;
template <class Result, class... Args>
struct Definition<Result(Args...)> {
  template <class F>
  static void add(const std::string& name, const F& function) {
    static_assert(std::is_class_v<F>, "a lambda: each has a type of its own");
    if (!kept<F>) kept<F> = new F(function);
    add_instruction(name, {type_name<Result>(), type_name<Args>()...},
                    &Lanes<F, Result, Args...>::run);
  }
};

// An instruction `name` with one result, given as a function of one lane: define<float(float,
// float)>("add.f32", ...).
template <class Signature, class F>
void define(const std::string& name, const F& function) {
  Definition<Signature>::add(name, function);
}

}  // namespace simt
