// A launch: a few blocks at a time, their warps in turns, the lanes of a warp one after the other up to the next
// collective, all in an order drawn from the seed.
#include "device.h"
#include "fiber.h"
#include <algorithm>
#include <stdarg.h>
#include <string.h>
#include <sys/mman.h>

namespace emu {

thread_local Lane* here;

namespace {

constexpr size_t STACKS_AT_ONCE = 64;  // in one mapping: there may be thousands, and systems limit mappings
constexpr uint32_t RESIDENT = 3;       // blocks at most at one time

Kernel*& first_kernel() {
    static Kernel* first;
    return first;
}

// The present lane's end: the next one starts, or, after the last, the scheduler goes on.
[[noreturn]] void leave() {
    Lane* me = here;
    Warp& warp = *me->warp;
    Block& block = *me->block;
    me->exited = true;
    void* nowhere;
    if (warp.started < LANES) {
        here = next_lane(warp);
        fiber_switch(&nowhere, here->sp);
    }
    if (warp.arrived) fault_of_many("ends while lanes of its warp wait for it");
    warp.ready = false;
    block.exited++;
    if (block.waiting) fault_of_many("ends while threads of its block wait at %s", block.barrier->name.c_str());
    fiber_switch(&nowhere, block.launch->scheduler);
    __builtin_unreachable();
}

void lane_main() {
    const Launch& launch = *here->block->launch;
    launch.kernel->enter(launch.args);
    leave();
}

Index unflatten(uint64_t i, Index size) {
    return {(uint32_t)(i % size.x), (uint32_t)(i / size.x % size.y), (uint32_t)(i / size.x / size.y)};
}

// Makes room for a block of this launch's size.
bool furnish(Launch& launch, uint32_t slot) {
    Room& room = launch.device->room;
    while (room.blocks.size() <= slot) {
        std::unique_ptr<Block> block(new Block{});
        void* at =
            mmap(nullptr, MAX_SHARED, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (at == MAP_FAILED) return false;
        block->shared.base = (unsigned char*)at;
        block->shared.bytes = MAX_SHARED;
        block->shared.what = "shared memory";
        if (!shadow_map(block->shared)) return false;
        room.blocks.push_back(std::move(block));
    }
    while (room.stacks.size() < (size_t)(slot + 1) * launch.threads) {
        void* at = mmap(nullptr, STACKS_AT_ONCE * STACK, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (at == MAP_FAILED) return false;
        for (size_t i = 0; i < STACKS_AT_ONCE; i++) room.stacks.push_back((char*)at + i * STACK);
    }
    Block& block = *room.blocks[slot];
    block.launch = &launch;
    block.shared.bytes = launch.shared_bytes;
    block.lanes.resize(launch.threads);
    block.warps.resize(launch.threads / LANES);
    for (uint32_t i = 0; i < launch.threads; i++) block.lanes[i].stack = room.stacks[(size_t)slot * launch.threads + i];
    return true;
}

void run(Launch& launch) {
    std::vector<uint32_t> todo(launch.grid.x * (size_t)launch.grid.y * launch.grid.z);
    for (size_t i = 0; i < todo.size(); i++) todo[i] = (uint32_t)i;
    for (size_t i = todo.size(); i > 1; i--) std::swap(todo[i - 1], todo[launch.random.below((uint32_t)i)]);
    uint32_t places = std::min<uint32_t>((uint32_t)todo.size(), 1 + launch.random.below(RESIDENT));
    std::vector<Block*> resident;
    for (uint32_t i = 0; i < places; i++) {
        if (!furnish(launch, i)) {
            launch.device->error = std::string(launch.kernel->name) + ": out of memory for stacks";
            launch.failed = true;
            return;
        }
        start_block(*launch.device->room.blocks[i], todo.back());
        todo.pop_back();
        resident.push_back(launch.device->room.blocks[i].get());
    }
    while (!resident.empty()) {
        uint32_t turn = launch.random.below((uint32_t)resident.size());
        Block& block = *resident[turn];
        uint32_t warps = (uint32_t)block.warps.size(), w = launch.random.below(warps);
        while (!block.warps[w].ready) w = (w + 1) % warps;
        here = block.warps[w].resume;
        fiber_switch(&launch.scheduler, here->sp);
        here = nullptr;
        if (launch.failed) return;
        if (block.waiting == warps) release_barrier(block);
        if (block.exited == warps) {
            launch.device->accesses += (uint64_t)(STEPS - launch.steps_left);
            launch.steps_left = STEPS, launch.branches_left = BRANCHES;
            if (todo.empty()) {
                resident.erase(resident.begin() + turn);
            } else {
                start_block(block, todo.back());
                todo.pop_back();
            }
        }
    }
}

}  // namespace

Room::~Room() {
    for (size_t i = 0; i < stacks.size(); i += STACKS_AT_ONCE) munmap(stacks[i], STACKS_AT_ONCE * STACK);
    for (auto& block : blocks) {
        block->shared.bytes = MAX_SHARED;
        shadow_unmap(block->shared);
        munmap(block->shared.base, MAX_SHARED);
    }
}

Kernel::Kernel(const char* name, uint32_t threads, size_t args_bytes, void (*enter)(const void*))
    : name(name), threads(threads), args_bytes(args_bytes), enter(enter), next(first_kernel()) {
    first_kernel() = this;
}

Index thread_index() { return here->index; }
Index block_index() { return here->block->index; }
Index block_size() { return here->block->launch->block; }
Index grid_size() { return here->block->launch->grid; }
void* shared_memory() { return here->block->shared.base; }

Time tick(Block& block) {
    block.launch->owner.push_back(block.number);
    return ++block.launch->device->now;
}

void start_block(Block& block, uint32_t number) {
    Launch& launch = *block.launch;
    block.number = number;
    block.index = unflatten(number, launch.grid);
    block.epoch = tick(block);
    block.waiting = block.exited = 0;
    block.known.clear();
    block.acquired.clear();
    if (block.shared.bytes) {
        memset(block.shared.base, POISON, block.shared.bytes);
        memset(block.shared.writer, 0, (block.shared.bytes + 1) / 2 * sizeof(Who));
    }
    for (uint32_t i = 0; i < launch.threads; i++) {
        Lane& lane = block.lanes[i];
        // Stacks begin at different offsets: were they all a multiple of 4096 apart, they would fight for the same
        // lines of the first-level cache.
        lane.sp = fiber_prepare(lane.stack + STACK - i % 61 * 64, lane_main);
        lane.warp = &block.warps[i / LANES];
        lane.block = &block;
        lane.time = block.epoch;
        lane.thread = (Who)i;
        lane.exited = false;
        lane.site = nullptr;
        lane.groups = 0;
        lane.copies.clear();
        lane.index = unflatten(i, launch.block);
    }
    for (uint32_t i = 0; i < block.warps.size(); i++) {
        Warp& warp = block.warps[i];
        warp.block = &block;
        warp.lanes = &block.lanes[i * LANES];
        warp.synced = block.epoch;
        warp.arrived = 0;
        begin_round(warp);
    }
}

void release_barrier(Block& block) {
    block.waiting = 0;
    block.epoch = tick(block);
    block.launch->device->barriers++;
    pass_on_to_block(block);
    for (Warp& warp : block.warps) warp.ready = true, warp.synced = block.epoch;
    for (Lane& lane : block.lanes) lane.time = block.epoch;
}

void begin_round(Warp& warp) {
    // Lane `first`, then every stride-th: with an odd stride that meets each lane once.
    uint64_t bits = warp.block->launch->random() >> 32;
    warp.first = bits % LANES;
    warp.stride = (bits / LANES % LANES) | 1;
    warp.started = 1;
    warp.resume = &warp.lanes[warp.first];
    warp.ready = true;
}

void yield() {
    Lane* me = here;
    me->warp->resume = me;
    fiber_switch(&me->sp, me->block->launch->scheduler);
}

namespace {

// Where the threads of a block stand: each place, and who is there.
std::string standing(const Block& block) {
    std::map<std::string, std::string> places;
    auto place = [](const Lane& lane) {
        return (lane.exited ? "ended, past " : "past ") + (lane.site ? lane.site->name : "its beginning");
    };
    for (size_t from = 0; from < block.lanes.size();) {
        size_t to = from + 1;
        while (to < block.lanes.size() && place(block.lanes[to]) == place(block.lanes[from])) to++;
        std::string& who = places[place(block.lanes[from])];
        if (who.size() < 200) who += " " + std::to_string(from) + (to - from > 1 ? "-" + std::to_string(to - 1) : "");
        from = to;
    }
    std::string text;
    for (auto& [where, who] : places) text += "\n  " + where + ": threads" + who;
    return text;
}

// The lane's stack is given up as it is, so nothing on it may own memory when it is left.
[[noreturn]] void end_launch(const char* format, va_list list, bool with_standing) {
    const Lane& me = *here;
    Launch& launch = *me.block->launch;
    char what[800], where[300];
    vsnprintf(what, sizeof what, format, list);
    const Index &b = me.block->index, &t = me.index;
    snprintf(where, sizeof where, "%s, block (%u, %u, %u), thread %u: ", launch.kernel->name, b.x, b.y, b.z, t.x);
    std::string& text = launch.device->error;
    text = where;
    text += what;
    if (me.site && !with_standing) text += "; after " + me.site->name;
    if (with_standing) text += standing(*me.block);
    launch.failed = true;
    void* nowhere;
    fiber_switch(&nowhere, launch.scheduler);
    __builtin_unreachable();
}

}  // namespace

void fault(const char* format, ...) {
    va_list list;
    va_start(list, format);
    end_launch(format, list, false);
}

void fault_of_many(const char* format, ...) {
    va_list list;
    va_start(list, format);
    end_launch(format, list, true);
}

}  // namespace emu

using namespace emu;

size_t emu_kernels(void) {
    size_t n = 0;
    for (Kernel* k = first_kernel(); k; k = k->next) n++;
    return n;
}

const char* emu_kernel(size_t i) {
    Kernel* k = first_kernel();
    while (k && i--) k = k->next;
    return k ? k->name : nullptr;
}

int emu_launch(emu_device* d, const char* name, const uint32_t grid[3], uint32_t block, uint32_t shared,
               const void* args, size_t args_bytes) {
    auto refuse = [&](const std::string& why) {
        d->error = std::string("launch of ") + name + ": " + why;
        return 1;
    };
    const Kernel* kernel = first_kernel();
    while (kernel && strcmp(kernel->name, name)) kernel = kernel->next;
    if (!kernel) return refuse("there is no such kernel");
    if (!block || block % LANES || block > kernel->threads || block > 1024)
        return refuse("blocks of " + std::to_string(block) + " threads; it takes whole warps, " +
                      std::to_string(kernel->threads) + " threads at most");
    if (args_bytes != kernel->args_bytes)
        return refuse(std::to_string(args_bytes) + " bytes of arguments, the kernel has " +
                      std::to_string(kernel->args_bytes));
    if (shared > MAX_SHARED)
        return refuse(std::to_string(shared) + " bytes of shared memory; 232448 are the most any device has");
    if (!grid[0] || !grid[1] || !grid[2] || grid[1] > 65535 || grid[2] > 65535 ||
        (uint64_t)grid[0] * grid[1] * grid[2] > 0x7fffffff)
        return refuse("a grid of " + std::to_string(grid[0]) + "x" + std::to_string(grid[1]) + "x" +
                      std::to_string(grid[2]) + " blocks");
    if (d->now > TICKS) forget_times(d);
    // A copy, aligned as the GPU's constant bank is, so that the kernel cannot see the caller's bytes change.
    alignas(64) unsigned char copy[4096];
    if (args_bytes > sizeof copy) return refuse("more than 4096 bytes of arguments");
    memcpy(copy, args, args_bytes);
    Launch launch{};
    launch.device = d;
    launch.kernel = kernel;
    launch.args = copy;
    launch.grid = {grid[0], grid[1], grid[2]};
    launch.block = {block, 1, 1};
    launch.threads = block;
    launch.shared_bytes = shared;
    launch.start = d->now + 1;
    launch.steps_left = STEPS, launch.branches_left = BRANCHES;
    launch.random.state = d->random() | 1;
    launch.off = site(d->off);
    run(launch);
    here = nullptr;
    d->now++;
    d->launches++;
    return launch.failed;
}
