// Order between threads: what a barrier, a sync_warp or a ticket makes happen before what.
#include "device.h"
#include <algorithm>

namespace emu {
namespace {

bool covers(const Clock& clock, uint32_t block, Time time, Who thread, bool lanes, bool warps) {
    for (const Known& k : clock) {
        if (k.block != block) continue;
        if (time < k.epoch) return true;
        if (!warps && k.thread / LANES == thread / LANES && time < k.synced) return true;
        if (!warps && !lanes && k.thread == thread && time <= k.time) return true;
    }
    return false;
}

// Of one thread, the latest word is enough: each of its words covers those before.
void join(Clock& into, const Clock& more) {
    for (const Known& k : more) {
        auto same = std::find_if(into.begin(), into.end(),
                                 [&](const Known& o) { return o.block == k.block && o.thread == k.thread; });
        if (same == into.end()) into.push_back(k);
        else if (same->time < k.time) *same = k;
    }
}

bool knows(const Acquired& a, const Lane& lane) {
    return a.thread == lane.thread || (a.by_warp && a.thread / LANES == lane.thread / LANES);
}

}  // namespace

bool ordered(Time time, Who who, bool many_lanes, bool many_warps) {
    const Who thread = who & THREAD;
    const Lane& me = *here;
    const Block& block = *me.block;
    const Launch& launch = *block.launch;
    if (time < launch.start) return true;
    uint32_t owner = launch.owner[time - launch.start];
    if (owner == block.number) {
        if (time < block.epoch) return true;
        if (many_warps || thread / LANES != me.thread / LANES) return false;
        return time < me.warp->synced || (!many_lanes && thread == me.thread);
    }
    if (covers(block.known, owner, time, thread, many_lanes, many_warps)) return true;
    for (const Acquired& a : block.acquired)
        if (knows(a, me) && covers(a.clock, owner, time, thread, many_lanes, many_warps)) return true;
    return false;
}

// A ticket: all that this thread knows becomes the counter's knowledge, and the counter's this thread's.
void release_and_acquire(const void* counter) {
    Lane& me = *here;
    Block& block = *me.block;
    Clock& clock = block.launch->tickets[counter];
    Clock before = clock;
    join(clock, block.known);
    for (const Acquired& a : block.acquired)
        if (knows(a, me)) join(clock, a.clock);
    join(clock, {{block.number, block.epoch, me.warp->synced, me.time, me.thread}});
    if (!before.empty()) block.acquired.push_back({me.thread, false, std::move(before)});
    // What the thread does from now on is not covered by this word.
    me.time = tick(block);
}

void pass_on_to_warp(Warp& warp) {
    for (Acquired& a : warp.block->acquired)
        if (a.thread / LANES == warp.lanes[0].thread / LANES) a.by_warp = true;
}

void pass_on_to_block(Block& block) {
    for (const Acquired& a : block.acquired) join(block.known, a.clock);
    block.acquired.clear();
}

// Long before the clock could run over, every stamp becomes old.
void forget_times(Device* device) {
    auto forget = [](Memory& m, size_t cells) {
        std::fill(m.wrote, m.wrote + cells, 0);
        std::fill(m.read, m.read + cells, 0);
    };
    Memory* last = nullptr;
    for (Memory* m : device->table) {
        if (m && m != last) forget(*m, (m->bytes + 1) / 2);
        last = m;
    }
    for (auto& block : device->room.blocks) forget(block->shared, MAX_SHARED / 2);
    device->now = 1;
}

}  // namespace emu
