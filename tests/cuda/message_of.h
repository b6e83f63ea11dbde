// What a launcher throws, for ctypes.
#pragma once

#include <exception>
#include <string>

// Null where f() throws nothing; valid until the next call.
template <class F>
const char* message_of(const F& f) {
  static std::string message;
  try {
    f();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}
