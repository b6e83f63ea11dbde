// The machine of the emulator: a grid's blocks of warps, which execute the instructions of a
// program.
//
// A warp executes one instruction for all its active threads at once, as the hardware does. A
// register is an array of 32 values, one per lane, in the warp's register file. Threads of a warp
// that diverge are groups of lanes with a place each in the program; they merge where they meet.
// All that is undefined or illegal is a Fault, nothing is guessed.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

namespace simt {

constexpr int kWarpSize = 32;
using Mask = uint32_t;  // one bit per lane
constexpr Mask kAllLanes = ~0u;
constexpr int kNumBarriers = 16;  // of a block

struct Warp;
struct Block;
struct Launch;
struct Instruction;

using Handler = void (*)(Warp&, const Instruction&, Mask);  // does it for the lanes of the mask

enum class Control : uint8_t { kNone, kBranch, kExit, kBarrier, kArrive, kCollective };
enum class Space : uint8_t { kGlobal, kShared, kLocal, kGeneric, kParam };
enum Order : uint8_t { kAcquire = 1, kRelease = 2, kStrong = 4 };  // bits

struct Instruction {
  Handler run;
  const uint32_t* operands;  // byte offsets of registers in the register file
  int64_t immediate;         // offset of an address, or target of a branch
  uint32_t guard;            // register of the predicate, if is_guarded
  uint16_t num_operands;
  Control control;
  Space space;
  uint8_t order;
  int8_t member_mask;  // which operand of a collective names its lanes; -1: it needs the whole warp
  bool is_guarded, is_negated;
};

struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Program {
  std::string name;  // of the kernel
  std::vector<Instruction> code;
  std::vector<std::string> statements;  // where each comes from, for reports
  std::vector<uint32_t> operands;
  std::vector<bool> is_label;
  std::vector<std::byte> constants;  // the first registers of every warp's file
  size_t register_bytes, local_bytes;
  std::vector<std::pair<uint32_t, uint32_t>> shared_gaps;  // in shared memory, between variables
  // log2 of the narrowest access, which shadow memory can tell apart
  int global_granule, shared_granule;
};

struct Options {
  uint64_t seed;
  int32_t order;        // 0 forward, 1 reverse, 2 random
  int32_t resident;     // blocks that run at the same time
  int32_t preempt;      // mean number of instructions of a warp's turn; 0: until it must wait
  int32_t race;         // 0 off, 1 strict, 2: threads of a warp may write different values
  int32_t early_async;  // cp.async copies at once, the other extreme of what is allowed
  uint64_t max_instructions;
};

// A range of global memory that kernels may access.
struct Buffer {
  uintptr_t begin, end;
  const char* name;
  std::byte* memory;     // what lies at `begin`; null: the memory was freed
  uint8_t* initialised;  // whether each byte was written, or null: all were
};

struct Dim3 {
  uint32_t x, y, z;
  uint64_t count() const { return uint64_t{x} * y * z; }
  Dim3 at(uint32_t i) const { return {i % x, i / x % y, i / x / y}; }
  std::string text() const;
};

// What is known of the accesses to one granule of memory.
struct Cell {
  uint32_t write_time, writer, read_time, reader;
};

struct Group {
  enum State : uint8_t { kReady, kAtCollective, kAtBarrier };
  uint32_t pc;
  Mask lanes;
  State state;
  uint8_t barrier;  // at which of the block's it waits
};

// One of the barriers of a block. All threads meet at it, or as many as the first one says.
struct Barrier {
  uint32_t pc;                                    // where the first thread came from
  uint32_t num_wanted;                            // 0: all threads
  uint32_t num_arrived, num_true;                 // of the latter, whose predicate is true
  std::vector<std::pair<int, uint32_t>> arrived;  // warps, if not all threads, and when
};

struct AsyncCopy {
  int lane;
  uint32_t group;
  uint32_t destination;  // in shared memory
  const std::byte* source;
  int num_bytes, source_bytes;
};

// Accesses that happened before: by a thread, or by all of a warp or block, up to a time.
using Clock = std::unordered_map<uint32_t, uint32_t>;

struct Warp {
  Block* block;
  int index;  // within the block
  Mask exists;
  std::vector<Group> groups;
  std::vector<std::byte> register_file;
  std::byte* registers;          // aligned, in register_file
  std::vector<std::byte> local;  // of all lanes

  uint32_t synced;                    // time of the last bar.warp.sync of all lanes
  std::vector<uint32_t> seen;         // [warp]: accesses of it before then happened before, by
                                      // barriers of a part of the block
  std::vector<uint32_t> pair_synced;  // [lane * 32 + other], once there was one of some lanes
  struct {
    uint32_t time, warp_synced, block_synced;
  } fence[kWarpSize];
  // addresses whose releases the lane's next fence acquires
  std::set<uintptr_t> observed[kWarpSize];

  std::vector<AsyncCopy> copies;   // those in flight
  uint32_t copy_group[kWarpSize];  // the group that is open

  template <class T>
  T* reg(uint32_t offset) {
    return reinterpret_cast<T*>(registers + offset);
  }
  uint32_t thread_id(int lane) const;  // unique in the grid
  std::string name(int lane) const;
};

struct Block {
  enum Granule : uint8_t { kUninitialised, kInFlight, kInitialised, kGap };
  Launch* launch;
  uint32_t index;
  uint32_t first_thread;  // its id
  std::vector<Warp> warps;
  std::vector<std::byte> shared_memory;
  std::byte* shared;              // aligned as on the hardware
  std::vector<Cell> cells;        // of shared memory
  std::vector<uint8_t> granules;  // state of shared memory
  uint32_t synced;                // time of the last barrier
  Clock acquired;                 // what other blocks did before
  uint64_t num_exited;
  Barrier barriers[kNumBarriers];
};

// One launch of a kernel; the faults are thrown out of run(). `buffers` are in the order of their
// addresses.
struct Launch {
  const Program& program;
  Options options;
  const std::byte* params;
  size_t num_params;
  Dim3 grid, dim;
  uint32_t shared_bytes;
  const std::vector<Buffer>& buffers;

  std::vector<Block> blocks;  // the resident ones
  std::vector<Warp*> ready;
  Warp* running;
  uint32_t num_started = 0;
  uint32_t start_time;
  std::vector<uint32_t> block_order;
  std::minstd_rand random;
  std::unordered_map<uintptr_t, Clock> released;  // at an address, by atomics
  const Instruction* current;                     // for the report of a fault
  uint64_t num_instructions = 0;

  Launch(const Program& program, const Options& options, const std::byte* params, size_t num_params,
         Dim3 grid, Dim3 dim, uint32_t shared_bytes, const std::vector<Buffer>& buffers)
      : program(program),
        options(options),
        params(params),
        num_params(num_params),
        grid(grid),
        dim(dim),
        shared_bytes(shared_bytes),
        buffers(buffers) {}

  void run();
  const std::string& place(uint32_t pc) const { return program.statements[pc]; }

 private:
  void start(Block& block);
  void start(Block& block, int warp);
  void run_slice(Warp& warp);
  void run_group(Warp& warp, size_t group, int64_t& budget);
  bool arrive_collective(Warp& warp, size_t group);
  void arrive_barrier(Warp& warp, size_t group);
  void open(Block& block, Barrier& barrier, uint8_t index);
  [[noreturn]] void report_deadlock();
  void exit(Warp& warp, size_t group);
};

extern uint32_t now;  // logical time: grows at each synchronisation, never goes back

[[noreturn]] void fault(const Warp& warp, int lane, const std::string& message);

// An instruction of the emulator. Its signature is the types of its operands: `=` marks a result,
// `*` what there may be any number of, `address` is 32 bits wide in shared memory, else 64.
struct Entry {
  std::string name, signature;
  Handler run;
  Control control = Control::kNone;
  int member_mask = -1;
};
std::vector<Entry>& table();
void define_arithmetic();
void define_conversions();
void define_memory();
void define_warp_operations();
void define_tensor_cores();

}  // namespace simt
