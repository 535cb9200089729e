// What lanes do together: barriers, shuffles, matrices; and asynchronous copies. A lane that arrives leaves what
// it brings in its warp's slots and starts the next lane; the last one does the work for all.
#include "device.h"
#include "fiber.h"
#include <string.h>

namespace emu {
namespace {

const char* name_of(Collective c) {
    switch (c) {
        case Collective::BLOCK_BARRIER: return "sync_block";
        case Collective::WARP_BARRIER: return "sync_warp";
        case Collective::SHUFFLE: return "shuffle";
        case Collective::SHUFFLE_XOR: return "shuffle_xor";
        case Collective::BALLOT: return "lanes_where";
        case Collective::LOAD_MATRICES: return "load_matrices";
        case Collective::LOAD_TRANSPOSED: return "load_matrices_transposed";
        case Collective::MMA_BF16: return "mma<bf16>";
        case Collective::MMA_F16: return "mma<f16>";
    }
    return "";
}

[[noreturn]] __attribute__((noinline, cold)) void diverged(const Warp& warp, Collective at, const Site* site) {
    fault_of_many("is at %s%s%s while other lanes of its warp are at %s%s%s", name_of(at), site ? ", " : "",
                  site ? site->name.c_str() : "", name_of(warp.at), warp.site ? ", " : "",
                  warp.site ? warp.site->name.c_str() : "");
}

// All lanes of a warp come together; `work` is done by the last, and says whether the warp then goes on.
template <class Work> __attribute__((always_inline)) inline void meet(Collective at, const Site* site, Work work) {
    Lane* me = here;
    Warp& warp = *me->warp;
    Launch& launch = *me->block->launch;
    if (warp.arrived == 0) warp.at = at, warp.site = site;
    else if (warp.at != at || warp.site != site) diverged(warp, at, site);
    // A stack that has grown into its neighbour's is noticed here at the latest.
    if (__builtin_expect((size_t)((char*)__builtin_frame_address(0) - me->stack) - STACK_SPARE > STACK - STACK_SPARE,
                         0))
        fault("needs more than %zu bytes of stack", STACK - STACK_SPARE);
    warp.arrived++;
    Lane* next;
    if (warp.started < LANES) {
        next = next_lane(warp);
    } else {
        if (warp.arrived < LANES)
            fault_of_many("is at %s, for which lanes of its warp that have ended are missing", name_of(at));
        if ((launch.steps_left -= LANES) < 0) never_ends();
        warp.arrived = 0;
        warp.turn ^= 1;
        begin_round(warp);
        bool goes_on = work(warp);
        // Now and then other warps and blocks come between.
        if (!goes_on || (launch.random.state >> 40) % 16 == 0) {
            fiber_switch(&me->sp, launch.scheduler);
            return;
        }
        next = warp.resume;
    }
    if (next == me) return;
    here = next;
    fiber_switch(&me->sp, next->sp);
}

bool off(const Site* site) { return site == here->block->launch->off; }

const Site* enter(const char* file, int line, const char* kind) {
    const Site* s = site(file, line, kind);
    here->site = s;
    return s;
}

void land(Copy& copy) {
    if (copy.from) memcpy(copy.to, copy.from, 16);
    else memset(copy.to, 0, 16);
    copy.landed = true;
}

}  // namespace

// ---- barriers and sites --------------------------------------------------------------------------

void sync_block(const char* file, int line) {
    const Site* s = enter(file, line, "barrier");
    if (off(s)) return;
    meet(Collective::BLOCK_BARRIER, s, [&](Warp& warp) {
        Block& block = *warp.block;
        if (block.waiting && block.barrier != s)
            fault_of_many("is at %s while other warps are at %s", s->name.c_str(), block.barrier->name.c_str());
        block.barrier = s;
        block.waiting++;
        warp.ready = false;
        if (block.exited)
            fault_of_many("is at %s, for which threads of its block that have ended are missing", s->name.c_str());
        return false;
    });
}

void sync_warp(const char* file, int line) {
    const Site* s = enter(file, line, "barrier");
    if (off(s)) return;
    meet(Collective::WARP_BARRIER, s, [](Warp& warp) {
        warp.synced = tick(*warp.block);
        for (int i = 0; i < LANES; i++) warp.lanes[i].time = warp.synced;
        pass_on_to_warp(warp);
        return true;
    });
}

bool mask(bool inside, const char* file, int line) {
    const Site* s = enter(file, line, "mask");
    return inside || off(s);
}

uint32_t ticket(uint32_t* counter, uint32_t add, const char* file, int line) {
    const Site* s = enter(file, line, "ticket");
    yield();  // others may come first
    touch_counter(counter);
    uint32_t before = *counter;
    *counter += add;
    // Switched off, it counts but orders nothing.
    if (!off(s)) release_and_acquire(counter);
    yield();
    return before;
}

// ---- shuffles ------------------------------------------------------------------------------------

namespace {

uint64_t exchange(Collective at, uint64_t x, int from) {
    Lane* me = here;
    Warp& warp = *me->warp;
    int turn = warp.turn;
    warp.in[turn][me->thread % LANES][0] = x;
    meet(at, nullptr, [](Warp&) { return true; });
    return warp.in[turn][from & (LANES - 1)][0];
}

}  // namespace

uint64_t shuffle_bits(uint64_t x, int lane) { return exchange(Collective::SHUFFLE, x, lane); }

uint64_t shuffle_xor_bits(uint64_t x, int lane_mask) {
    return exchange(Collective::SHUFFLE_XOR, x, here->thread ^ lane_mask);
}

uint32_t lanes_where(bool x) {
    Lane* me = here;
    Warp& warp = *me->warp;
    int turn = warp.turn;
    warp.in[turn][me->thread % LANES][0] = x;
    meet(Collective::BALLOT, nullptr, [turn](Warp& warp) {
        uint64_t all = 0;
        for (int i = 0; i < LANES; i++) all |= warp.in[turn][i][0] << i;
        warp.out[turn][0][0] = all;
        return true;
    });
    return (uint32_t)warp.out[turn][0][0];
}

// ---- memory --------------------------------------------------------------------------------------

Bits128 load_128(const void* global) {
    read_global(global);
    Bits128 x;
    memcpy(&x, global, 16);
    return x;
}

Bits128 load_128_stream(const void* global) {
    read_stream(global);
    Bits128 x;
    memcpy(&x, global, 16);
    return x;
}

void store_128(void* global, Bits128 x) {
    write_global(global);
    memcpy(global, &x, 16);
}

// A copy lands at a random one of: its issue, any later issue of this thread, the wait that covers it. Nobody may
// touch its destination until the wait, nor change its source.
void copy16_async(void* shared, const void* global, bool valid) {
    Lane& me = *here;
    check_alignment(shared, 16);
    check_alignment(global, 16);
    begin_copy(shared);
    Copy issued{(unsigned char*)shared, valid ? global : nullptr, me.groups, false, {}};
    if (valid) {
        read_global(global);
        memcpy(issued.issued, global, 16);
    }
    me.copies.push_back(issued);
    Random& random = me.block->launch->random;
    uint64_t draw = random();
    if (draw >> 62 == 0) {
        Copy& copy = me.copies[(draw >> 32 & 0xffff) % me.copies.size()];
        if (!copy.landed) land(copy);
    }
}

void commit_copies() { here->groups++; }

void wait_copies(int pending, const char* file, int line) {
    Lane& me = *here;
    if (off(enter(file, line, "wait"))) return;
    size_t kept = 0;
    for (Copy& copy : me.copies) {
        if (copy.group + (uint32_t)pending < me.groups) {
            if (!copy.landed) land(copy);
            if (copy.from && memcmp(copy.from, copy.issued, 16))
                fault("waits for an asynchronous copy whose source has changed since its issue");
            end_copy(copy.to);
        } else {
            me.copies[kept++] = copy;
        }
    }
    me.copies.resize(kept);
}

// ---- matrices ------------------------------------------------------------------------------------

Bits128 load_matrices_bits(const void* shared_row, bool transposed) {
    Lane* me = here;
    Warp& warp = *me->warp;
    int turn = warp.turn, lane = me->thread % LANES;
    check_alignment(shared_row, 16);
    read_shared(shared_row);
    warp.in[turn][lane][0] = (uintptr_t)shared_row;
    meet(transposed ? Collective::LOAD_TRANSPOSED : Collective::LOAD_MATRICES, nullptr, [turn, transposed](Warp& warp) {
        uint16_t m[4][8][8];
        for (int i = 0; i < LANES; i++) memcpy(m[i / 8][i % 8], (const void*)warp.in[turn][i][0], 16);
        auto* out = (uint32_t (*)[4])warp.out[turn];
        for (int l = 0; l < LANES; l++) {
            int row = l / 4, col = l % 4 * 2;
            for (int i = 0; i < 4; i++)
                out[l][i] = transposed ? (uint32_t)m[i][col + 1][row] << 16 | m[i][col][row]
                                       : (uint32_t)m[i][row][col + 1] << 16 | m[i][row][col];
        }
        return true;
    });
    return {warp.out[turn][lane][0], warp.out[turn][lane][1]};
}

namespace {

// The fragments of 32 lanes, by the PTX ISA's figures for mma.m16n8k16: with g = lane / 4 and t = lane % 4, a0 to a3
// hold rows g, g + 8, g, g + 8 at columns 2t, 2t, 2t + 8, 2t + 8 and the next; b0 and b1 rows 2t and 2t + 8 and the
// next of column g; c0 and c1 row g at columns 2t and 2t + 1, c2 and c3 row g + 8.
void multiply_fragments(Warp& warp, int turn, bool bf16) {
    uint16_t a[16][16], b[8][16];
    float c[16][8];
    for (int l = 0; l < LANES; l++) {
        const uint64_t* in = warp.in[turn][l];
        uint32_t a0[4], b0[2];
        memcpy(a0, in, 16), memcpy(b0, in + 2, 8);
        int g = l / 4, t = l % 4;
        memcpy(&a[g][2 * t], a0, 4), memcpy(&a[g + 8][2 * t], a0 + 1, 4);
        memcpy(&a[g][2 * t + 8], a0 + 2, 4), memcpy(&a[g + 8][2 * t + 8], a0 + 3, 4);
        memcpy(&b[g][2 * t], b0, 4), memcpy(&b[g][2 * t + 8], b0 + 1, 4);
        memcpy(&c[g][2 * t], in + 3, 8), memcpy(&c[g + 8][2 * t], in + 4, 8);
    }
    multiply(a, b, c, bf16);
    for (int l = 0; l < LANES; l++) {
        int g = l / 4, t = l % 4;
        memcpy(&warp.out[turn][l][0], &c[g][2 * t], 8), memcpy(&warp.out[turn][l][1], &c[g + 8][2 * t], 8);
    }
}

}  // namespace

Float4 mma_values(Float4 c, uint64_t a01, uint64_t a23, uint64_t b01, bool bf16) {
    Lane* me = here;
    Warp& warp = *me->warp;
    int turn = warp.turn, lane = me->thread % LANES;
    uint64_t* in = warp.in[turn][lane];
    in[0] = a01, in[1] = a23, in[2] = b01;
    memcpy(in + 3, &c, 16);
    meet(bf16 ? Collective::MMA_BF16 : Collective::MMA_F16, nullptr, [turn, bf16](Warp& warp) {
        multiply_fragments(warp, turn, bf16);
        return true;
    });
    memcpy(&c, warp.out[turn][lane], 16);
    return c;
}

}  // namespace emu
