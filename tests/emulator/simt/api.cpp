// What Python calls.
#include <cxxabi.h>

#include <algorithm>
#include <cstdlib>

#include "define.h"

namespace simt {

std::vector<Entry>& table() {
  static std::vector<Entry> entries;
  return entries;
}

void add_instruction(const std::string& name, std::initializer_list<const char*> types,
                     Handler run) {
  std::string signature;
  for (const char* type : types) signature += (signature.empty() ? "=" : " ") + std::string(type);
  table().push_back({name, signature, run});
}

namespace {

std::string message;

const std::vector<Entry>& all_instructions() {
  if (table().empty()) {
    define_arithmetic();
    define_conversions();
    define_memory();
    define_warp_operations();
    define_tensor_cores();
  }
  return table();
}

// A C++ name as it is written in the source; others as they are.
std::string demangled(const char* name) {
  char* const readable = abi::__cxa_demangle(name, nullptr, nullptr, nullptr);
  const std::string result = readable ? readable : name;
  std::free(readable);
  return result;
}

// One instruction as lowering.py writes it.
struct Row {
  int64_t entry, guard, is_negated, immediate, first_operand, num_operands, space, order, is_label;
};

// Memory of the host that a kernel may access.
struct Range {
  uintptr_t begin, end;
  const char* name;
};

}  // namespace

extern "C" {

// The table of instructions, one "name<tab>signature" a line; a row of a program names an entry by
// its line.
const char* simt_instructions() {
  static std::string text;
  if (text.empty())
    for (const Entry& entry : all_instructions())
      text += entry.name + "\t" + entry.signature + "\n";
  return text.c_str();
}

// What Python tells of a program. Its twin is `_Program` of machine.py.
struct ProgramParts {
  const char* name;
  const Row* rows;
  const char* const* statements;  // the rows' places in the source
  size_t num_rows;
  const uint32_t* operands;
  size_t num_operands;
  const std::byte* constants;
  size_t constant_bytes, register_bytes, local_bytes;
  const uint32_t* shared_gaps;  // pairs
  size_t num_shared_gaps;
  int32_t global_granule, shared_granule;
};

Program* simt_program(const ProgramParts* parts) {
  Program* program = new Program;
  program->name = demangled(parts->name);
  program->statements.assign(parts->statements, parts->statements + parts->num_rows);
  program->operands.assign(parts->operands, parts->operands + parts->num_operands);
  program->constants.assign(parts->constants, parts->constants + parts->constant_bytes);
  program->register_bytes = parts->register_bytes;
  program->local_bytes = parts->local_bytes;
  for (size_t i = 0; i < parts->num_shared_gaps; ++i)
    program->shared_gaps.emplace_back(parts->shared_gaps[2 * i], parts->shared_gaps[2 * i + 1]);
  program->global_granule = parts->global_granule;
  program->shared_granule = parts->shared_granule;
  const Row* const rows = parts->rows;
  for (const Row* row = rows; row != rows + parts->num_rows; ++row) {
    const Entry& entry = all_instructions()[row->entry];
    program->code.push_back(
        {entry.run, program->operands.data() + row->first_operand, row->immediate,
         static_cast<uint32_t>(row->guard), static_cast<uint16_t>(row->num_operands), entry.control,
         static_cast<Space>(row->space), static_cast<uint8_t>(row->order),
         static_cast<int8_t>(entry.member_mask), row->guard >= 0, row->is_negated != 0});
    program->is_label.push_back(row->is_label);
  }
  return program;
}

// Run a grid. Null, or what went wrong.
const char* simt_launch(const Program* program, const std::byte* params, size_t num_params,
                        const Dim3* grid, const Dim3* block, uint32_t shared_bytes,
                        const Options* options, const Range* ranges, size_t num_ranges) {
  std::vector<Buffer> buffers;
  for (const Range* r = ranges; r != ranges + num_ranges; ++r)
    buffers.push_back({r->begin, r->end, r->name, reinterpret_cast<std::byte*>(r->begin), nullptr});
  std::sort(buffers.begin(), buffers.end(),
            [](const Buffer& a, const Buffer& b) { return a.begin < b.begin; });
  Launch launch(*program, *options, params, num_params, *grid, *block, shared_bytes, buffers);
  try {
    launch.run();
    return nullptr;
  } catch (const Fault& fault) {
    message = fault.what();
    return message.c_str();
  }
}
}

}  // namespace simt
