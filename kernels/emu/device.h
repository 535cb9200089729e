// The emulated device inside. Memory and its shadow (memory.cc), the check of an access (access.cc), threads
// and their order (launch.cc), collectives (collectives.cc), order between blocks (order.cc), sites (sites.cc).
#pragma once
#include "api.h"
#include "emu.h"
#include <map>
#include <memory>
#include <string>
#include <vector>

// A program's own variable, not one of a library that is loaded later: a load and no call.
#ifdef __APPLE__
#define EMU_TLS
#else
#define EMU_TLS __attribute__((tls_model("initial-exec")))
#endif

namespace emu {

// A device's clock ticks at every barrier and every launch, so a time names one interval of one block between
// two of its barriers (or of one warp between two sync_warps), and a stamp from an earlier launch is simply small.
using Time = uint32_t;

constexpr int LANES = 32;
// A lane's stack; the hooks tell by it which accesses are to a thread's own variables.
constexpr size_t STACK = (size_t)64 << 10, STACK_SPARE = (size_t)16 << 10;
// Accesses and arrivals in the time of one block. The longest block of a real model (a 128x128 tile of Linear,
// K = 13824) takes some five million; 67 million take half a second.
constexpr int64_t STEPS = (int64_t)1 << 26;
// The same for branches, of which loops that touch no memory are made.
constexpr int64_t BRANCHES = (int64_t)1 << 28;
// Ticks after which a device's stamps are cleared, at the next launch: often enough that tests go through it.
constexpr Time TICKS = 1 << 20;
constexpr uint32_t MAX_SHARED = 227 << 10;  // bytes of a block, on any device
constexpr unsigned char POISON = 0xff;

// Who last touched a cell: a thread's index in its block, and flags.
using Who = uint16_t;
constexpr Who THREAD = 0x3ff;
constexpr Who BYTES = 0xc00, LOW_BYTE = 0x400, HIGH_BYTE = 0x800;  // of the writer: which bytes are written
constexpr Who COPYING = 0x1000;                                    // of the writer: an asynchronous copy is under way
constexpr Who ATOMIC = 0x2000;                                     // of the writer: by a ticket or an addition
constexpr Who MANY_LANES = 0x1000, MANY_WARPS = 0x2000, MANY_BLOCKS = 0x4000;  // of the reader: and others beside it

// What is known of a piece of memory. A cell is 16 bits: the two bytes of one cell have one last writer.
struct Memory {
    unsigned char* base = nullptr;
    size_t bytes = 0;
    Time* wrote = nullptr;
    Time* read = nullptr;
    Who* writer = nullptr;
    Who* reader = nullptr;
    std::string what;
};

// ---- order between blocks ----

// What a ticket makes known of a block: everything its threads did before `epoch`, what warp `thread / 32` did
// before `synced`, what `thread` did up to `time`.
struct Known {
    uint32_t block;
    Time epoch, synced, time;
    Who thread;
};
using Clock = std::vector<Known>;

struct Acquired {
    Who thread;
    bool by_warp;  // a sync_warp has passed it on to the whole warp
    Clock clock;
};

// ---- threads ----

struct Site {
    std::string name;
    int id;
};

enum class Collective : uint8_t {
    BLOCK_BARRIER,
    WARP_BARRIER,
    SHUFFLE,
    SHUFFLE_XOR,
    BALLOT,
    LOAD_MATRICES,
    LOAD_TRANSPOSED,
    MMA_BF16,
    MMA_F16
};

struct Copy {
    unsigned char* to;
    const void* from;  // null: zeroes
    uint32_t group;
    bool landed;
    uint64_t issued[2];  // what the source held at the issue
};

struct Warp;
struct Block;
struct Launch;

struct Lane {
    void* sp;
    char* stack;
    Warp* warp;
    Block* block;
    Time time;
    Who thread;
    bool exited;
    const Site* site;  // the last it came by, for reports
    uint32_t groups;   // committed
    std::vector<Copy> copies;
    Index index;
};

struct Warp {
    Block* block;
    Lane* lanes;
    Lane* resume;                    // who runs when the warp runs
    Time synced;                     // the last sync_warp
    uint8_t first, stride, started;  // the order of lanes in this round; how many have started
    uint8_t arrived;
    uint8_t turn;  // collectives alternate between two sets of slots: a lane may be one collective ahead
    bool ready;
    Collective at;  // what the lanes that have arrived have arrived at
    const Site* site;
    uint64_t in[2][LANES][5];
    uint64_t out[2][LANES][2];
};

struct Block {
    Launch* launch;
    uint32_t number;
    Index index;
    Time epoch;  // its last barrier
    Memory shared;
    std::vector<Lane> lanes;
    std::vector<Warp> warps;
    uint32_t waiting, exited;        // warps
    const Site* barrier;             // where those that wait do
    Clock known;                     // to all its threads
    std::vector<Acquired> acquired;  // since the last barrier, by one thread or warp
};

struct Random {
    uint64_t state;
    uint64_t operator()() {  // xorshift64*
        state ^= state >> 12, state ^= state << 25, state ^= state >> 27;
        return state * 0x2545f4914f6cdd1dull;
    }
    uint32_t below(uint32_t n) { return (uint32_t)(((*this)() >> 32) * n >> 32); }
};

struct Device;

struct Launch {
    Device* device;
    const Kernel* kernel;
    const void* args;
    Index grid, block;
    uint32_t threads, shared_bytes;
    Time start;
    int64_t steps_left, branches_left;  // before the kernel counts as one that never ends
    bool failed;
    void* scheduler;  // its stack pointer while a lane runs
    Random random;
    std::vector<uint32_t> owner;  // the block of each time since `start`
    std::map<const void*, Clock> tickets;
    const Site* off;
};

// The stacks and blocks that a device's launches use in turn.
struct Room {
    std::vector<char*> stacks;
    std::vector<std::unique_ptr<Block>> blocks;
    ~Room();
};

struct Device {
    Random random;
    Time now = 1;
    std::string error;
    int off = -1;
    uint64_t launches = 0, barriers = 0, accesses = 0;
    // Address space of its own, cut into slots; an allocation begins somewhere in a slot, owns whole slots, and
    // leaves at least half a slot after it free. A stray address so meets nothing, and lookup is one index.
    unsigned char* space = nullptr;
    size_t slots = 0, next_slot = 0;
    std::vector<Memory*> table;
    Room room;
    Memory* find(const void* at) const;
};

// The lane that this OS thread runs; null outside a launch.
extern thread_local Lane* here EMU_TLS;

// ---- the parts, to each other ----

constexpr size_t SLOT = (size_t)16 << 20;
inline Memory* Device::find(const void* at) const {
    size_t slot = (size_t)((const unsigned char*)at - space) / SLOT;
    return slot < slots ? table[slot] : nullptr;
}

// The shadow of `bytes` bytes, zero: nothing written, nobody there. False: out of memory.
bool shadow_map(Memory& m);
void shadow_unmap(Memory& m);

// Checks and records an access of the present lane to 16 bytes; on a fault it does not return.
void read_shared(const void* at);
void read_global(const void* at);
void write_global(void* at);
void read_stream(const void* at);  // past the caches that keep up with writes
// An asynchronous copy into shared memory is issued, and later waited for.
void begin_copy(void* to);
void end_copy(void* to);
// A ticket's access to its counter.
void touch_counter(void* at);
void check_alignment(const void* at, size_t n);

// Of the program's own constants, the only memory beside a kernel's own that it may read.
bool is_constant(const void* at, size_t n);

// Ends the launch with a text that begins with kernel, block and thread.
[[noreturn]] __attribute__((format(printf, 1, 2))) void fault(const char* format, ...);
// The same, of threads that do not come together: the text tells where each of the block stands.
[[noreturn]] __attribute__((format(printf, 1, 2))) void fault_of_many(const char* format, ...);
// No steps are left.
[[noreturn]] __attribute__((cold)) void never_ends();
// A new time that belongs to a block.
Time tick(Block& block);
// Other warps may run now.
void yield();
void start_block(Block& block, uint32_t number);
void begin_round(Warp& warp);
inline Lane* next_lane(Warp& warp) { return &warp.lanes[(warp.first + warp.started++ * warp.stride) % LANES]; }
void release_barrier(Block& block);

// Whether an access at `time` by `who`, or by more lanes or warps beside it, happened before now, as the present lane
// may know.
bool ordered(Time time, Who who, bool many_lanes, bool many_warps);
void release_and_acquire(const void* counter);
// What one thread learnt from a ticket reaches its warp by a sync_warp, its block by a barrier.
void pass_on_to_warp(Warp& warp);
void pass_on_to_block(Block& block);
void forget_times(Device* device);

const Site* site(const char* file, int line, const char* kind);
const Site* site(int id);

}  // namespace emu

struct emu_device : emu::Device {};
