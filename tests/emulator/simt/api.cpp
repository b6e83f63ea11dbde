// What Python calls.
#include <algorithm>

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

// `statements` are the rows' places in the source.
Program* simt_program(const char* name, const Row* rows, size_t num_rows,
                      const char* const* statements, const uint32_t* operands, size_t num_operands,
                      const std::byte* constants, size_t constant_bytes, size_t register_bytes,
                      size_t local_bytes, int global_granule, int shared_granule) {
  Program* program = new Program;
  program->name = name;
  program->statements.assign(statements, statements + num_rows);
  program->operands.assign(operands, operands + num_operands);
  program->constants.assign(constants, constants + constant_bytes);
  program->register_bytes = register_bytes;
  program->local_bytes = local_bytes;
  program->global_granule = global_granule;
  program->shared_granule = shared_granule;
  for (const Row* row = rows; row != rows + num_rows; ++row) {
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
