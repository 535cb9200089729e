// The check of an access: where it points, whether the bytes were written, whether another thread touched them
// without order between. Every load and store of a kernel comes through here, so the usual case is short.
#include "device.h"
#include <algorithm>
#include <string.h>

namespace emu {
namespace {

struct Access {
    Memory& m;
    size_t offset, bytes;
    const char* verb;
};

[[noreturn]] __attribute__((noinline, cold)) void race(const Access& a, Time time, Who who, const char* did) {
    const Launch& launch = *here->block->launch;
    uint32_t block = launch.owner[time - launch.start];
    char other[48] = "";
    if (block != here->block->number) snprintf(other, sizeof other, " of block %u", block);
    fault("race: %s %zu bytes at offset %zu of %s, which thread %u%s %s with no barrier or ticket between", a.verb,
          a.bytes, a.offset, a.m.what.c_str(), who & THREAD, other, did);
}

[[noreturn]] __attribute__((noinline, cold)) void unreadable(const Access& a, size_t cell, size_t cells) {
    for (size_t i = cell; i < cell + cells; i++)
        if (a.m.writer[i] & COPYING)
            fault("%s %zu bytes at offset %zu of %s, where an asynchronous copy of thread %u is still under way",
                  a.verb, a.bytes, a.offset, a.m.what.c_str(), a.m.writer[i] & THREAD);
    fault("%s %zu bytes at offset %zu of %s that nothing has written", a.verb, a.bytes, a.offset, a.m.what.c_str());
}

// Whose memory it would be: the buffer that ends before or begins after the address.
[[noreturn]] __attribute__((noinline, cold)) void outside(const void* at, size_t n, const char* verb) {
    auto* p = (const unsigned char*)at;
    const Block& block = *here->block;
    const Device& device = *block.launch->device;
    constexpr ptrdiff_t NEAR = 1 << 20;
    for (const Memory* m : {&block.shared, (const Memory*)device.find(p), (const Memory*)device.find(p - NEAR),
                            (const Memory*)device.find(p + NEAR)}) {
        if (!m) continue;
        ptrdiff_t offset = p - m->base, past = offset - (ptrdiff_t)m->bytes;
        const char* what = m->what.c_str();
        if (offset >= 0 && past < 0)
            fault("%s %zu bytes at offset %td of %s, past its end (%zu bytes)", verb, n, offset, what, m->bytes);
        if (offset >= 0 && past < NEAR)
            fault("%s %zu bytes, %td past the end of %s (%zu bytes)", verb, n, past, what, m->bytes);
        if (offset < 0 && offset > -NEAR) fault("%s %zu bytes, %td before %s", verb, n, -offset, what);
    }
    fault("%s %zu bytes at %p, which is no memory of this device", verb, n, at);
}

bool readers_ordered(Time time, Who reader) {
    return !(reader & MANY_BLOCKS) && ordered(time, reader, reader & MANY_LANES, reader & MANY_WARPS);
}

// How several readers of one cell since the last barrier (or launch) are remembered: by the latest, and by who
// else there was. Readers that a barrier has put before this one are forgotten: what is ordered after this one
// is ordered after them.
void join_reader(Time& time, Who& who, Time quiet, const Lane& me) {
    const Block& block = *me.block;
    const Launch& launch = *block.launch;
    const Time before = time;
    const Who other = who;
    if (before >= quiet && (other & MANY_BLOCKS)) return;
    time = me.time;
    who = me.thread;
    if (before < quiet) return;
    if (launch.owner[before - launch.start] != block.number) {
        if (!readers_ordered(before, other)) who |= MANY_BLOCKS;
        return;
    }
    if (before < block.epoch) return;
    if ((other & MANY_WARPS) || (other & THREAD) / LANES != me.thread / LANES) who |= MANY_WARPS;
    else if (before >= me.warp->synced && ((other & MANY_LANES) || (other & THREAD) != me.thread)) who |= MANY_LANES;
}

// Cells whose stamps are older than `quiet` raise no question of order.
template <bool writes>
__attribute__((always_inline)) inline void touch(Memory& m, size_t offset, size_t bytes, Time quiet, const Lane& me) {
    const size_t cell = offset / 2, cells = bytes > 2 ? bytes / 2 : 1;
    const Who need = bytes > 1 ? BYTES : offset % 2 ? HIGH_BYTE : LOW_BYTE;
    Time* __restrict wrote = m.wrote + cell;
    Time* __restrict read = m.read + cell;
    Who* __restrict writer = m.writer + cell;
    Who* __restrict reader = m.reader + cell;
    Who all = 0xffff, any = 0;
    Time latest_write = 0, latest_read = 0;
    for (size_t i = 0; i < cells; i++) {
        all &= writer[i], any |= writer[i];
        latest_write = std::max(latest_write, wrote[i]);
        latest_read = std::max(latest_read, read[i]);
    }
    const Access access{m, offset, bytes, writes ? "writes" : "reads"};
    if (writes ? (any & COPYING) != 0 : (all & need) != need) unreadable(access, cell, cells);
    if (__builtin_expect(latest_write >= quiet, 0))
        for (size_t i = 0; i < cells; i++)
            if (wrote[i] >= quiet && !ordered(wrote[i], writer[i], false, false))
                race(access, wrote[i], writer[i], "wrote");
    if (writes) {
        if (__builtin_expect(latest_read >= quiet, 0))
            for (size_t i = 0; i < cells; i++)
                if (read[i] >= quiet && !readers_ordered(read[i], reader[i]))
                    race(access, read[i], reader[i], reader[i] & ~THREAD ? "(and others) read" : "read");
        for (size_t i = 0; i < cells; i++) wrote[i] = me.time;
        for (size_t i = 0; i < cells; i++)
            writer[i] = bytes > 1 ? me.thread | BYTES : me.thread | need | (writer[i] & BYTES);
    } else if (__builtin_expect(latest_read < quiet, 1)) {
        for (size_t i = 0; i < cells; i++) read[i] = me.time;
        for (size_t i = 0; i < cells; i++) reader[i] = me.thread;
    } else {
        for (size_t i = 0; i < cells; i++) join_reader(read[i], reader[i], quiet, me);
    }
}

// Any length and alignment, as the compiler's merged accesses have them: by cells, and bytes at the ends.
template <bool writes> void touch_range(Memory& m, size_t offset, size_t bytes, Time quiet, const Lane& me) {
    while (bytes) {
        size_t n = offset % 2 || bytes == 1 ? 1 : 2;
        touch<writes>(m, offset, n, quiet, me);
        offset += n, bytes -= n;
    }
}

enum class Where { ANY, SHARED, GLOBAL };

template <bool writes, size_t fixed, Where where = Where::ANY>
__attribute__((always_inline)) inline void access(const void* at, size_t bytes = fixed, bool aligned = true) {
    Lane* me = here;
    if (where == Where::ANY) {
        if (!me || (size_t)((char*)at - me->stack) < STACK) return;
    }
    Block& block = *me->block;
    Launch& launch = *block.launch;
    if (__builtin_expect(--launch.steps_left < 0, 0)) never_ends();
    if (fixed && aligned && __builtin_expect((uintptr_t)at % fixed != 0, 0)) check_alignment(at, fixed);
    Memory* m = &block.shared;
    size_t offset = (size_t)((const unsigned char*)at - m->base);
    Time quiet = block.epoch;
    if (where == Where::GLOBAL || offset >= m->bytes) {
        m = where == Where::SHARED ? nullptr : launch.device->find(at);
        quiet = launch.start;
        if (m) offset = (size_t)((const unsigned char*)at - m->base);
        if (!m || offset >= m->bytes) {
            if (!writes && where == Where::ANY && is_constant(at, bytes)) return;
            outside(at, bytes, writes ? "writes" : "reads");
        }
    }
    if (__builtin_expect(bytes > m->bytes - offset, 0)) outside(at, bytes, writes ? "writes" : "reads");
    if (fixed && aligned) touch<writes>(*m, offset, fixed, quiet, *me);
    else touch_range<writes>(*m, offset, bytes, quiet, *me);
}

}  // namespace

void never_ends() {
    fault("does not end: %lld accesses and collectives, or %lld branches, in one block's time", (long long)STEPS,
          (long long)BRANCHES);
}

void check_alignment(const void* at, size_t n) {
    if ((uintptr_t)at % n) fault("touches %zu bytes at %p, which is not a multiple of %zu", n, at, n);
}

void read_shared(const void* at) { access<false, 16, Where::SHARED>(at); }
void read_global(const void* at) { access<false, 16, Where::GLOBAL>(at); }
void write_global(void* at) { access<true, 16, Where::GLOBAL>(at); }

void read_stream(const void* at) {
    access<false, 16, Where::GLOBAL>(at);
    const Launch& launch = *here->block->launch;
    Memory& m = *launch.device->find(at);
    size_t offset = (size_t)((const unsigned char*)at - m.base);
    for (size_t i = offset / 2; i < offset / 2 + 8; i++)
        if (m.wrote[i] >= launch.start)
            fault(
                "streams 16 bytes at offset %zu of %s that this launch has written, which caches may not have noticed",
                offset, m.what.c_str());
}

void begin_copy(void* to) {
    access<true, 16, Where::SHARED>(to);
    Memory& m = here->block->shared;
    size_t cell = (size_t)((unsigned char*)to - m.base) / 2;
    for (size_t i = cell; i < cell + 8; i++) m.writer[i] = here->thread | COPYING;
    for (size_t i = 0; i < 16; i++) ((unsigned char*)to)[i] = POISON;
}

void end_copy(void* to) {
    Memory& m = here->block->shared;
    size_t cell = (size_t)((unsigned char*)to - m.base) / 2;
    for (size_t i = cell; i < cell + 8; i++) m.writer[i] = here->thread | BYTES;
    for (size_t i = cell; i < cell + 8; i++) m.wrote[i] = here->time;
}

namespace {

// Atomic additions do not race with each other; with all other accesses they do.
void touch_atomically(const Access& a, Time quiet) {
    if (--here->block->launch->steps_left < 0) never_ends();
    for (size_t i = a.offset / 2; i < a.offset / 2 + 2; i++) {
        Time &wrote = a.m.wrote[i], &read = a.m.read[i];
        Who &writer = a.m.writer[i], &reader = a.m.reader[i];
        if ((writer & BYTES) != BYTES) unreadable(a, i, 1);
        if (wrote >= quiet && !(writer & ATOMIC) && !ordered(wrote, writer, false, false))
            race(a, wrote, writer, "wrote");
        if (read >= quiet && !readers_ordered(read, reader)) race(a, read, reader, "read");
        wrote = here->time;
        writer = here->thread | BYTES | ATOMIC;
    }
}

}  // namespace

void touch_counter(void* at) {
    constexpr const char* VERB = "takes a ticket of";
    check_alignment(at, 4);
    const Launch& launch = *here->block->launch;
    Memory* m = launch.device->find(at);
    size_t offset = m ? (size_t)((unsigned char*)at - m->base) : 0;
    if (!m || offset >= m->bytes || m->bytes - offset < 4) outside(at, 4, VERB);
    touch_atomically({*m, offset, 4, VERB}, launch.start);
}

void add_shared(uint32_t* at, uint32_t x) {
    constexpr const char* VERB = "adds to";
    check_alignment(at, 4);
    Block& block = *here->block;
    size_t offset = (size_t)((unsigned char*)at - block.shared.base);
    if (offset >= block.shared.bytes || block.shared.bytes - offset < 4) outside(at, 4, VERB);
    touch_atomically({block.shared, offset, 4, VERB}, block.epoch);
    *at += x;
}

}  // namespace emu

// The calls that -fsanitize=thread puts before each access. Atomics are left out on purpose: a kernel that
// uses one, instead of a primitive of ptx.cuh, does not link.
using namespace emu;
extern "C" {
// The call that -fsanitize-coverage=trace-pc puts at each branch's target: a loop that touches no memory shows here.
void __sanitizer_cov_trace_pc() {
    if (here && --here->block->launch->branches_left < 0) never_ends();
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_read1(void* at) { access<false, 1>(at); }
void __tsan_read2(void* at) { access<false, 2>(at); }
void __tsan_read4(void* at) { access<false, 4>(at); }
void __tsan_read8(void* at) { access<false, 8>(at); }
void __tsan_read16(void* at) { access<false, 16>(at); }
void __tsan_write1(void* at) { access<true, 1>(at); }
void __tsan_write2(void* at) { access<true, 2>(at); }
void __tsan_write4(void* at) { access<true, 4>(at); }
void __tsan_write8(void* at) { access<true, 8>(at); }
void __tsan_write16(void* at) { access<true, 16>(at); }
// Merged by the compiler out of smaller accesses, each of which was aligned.
void __tsan_unaligned_read2(void* at) { access<false, 0>(at, 2, false); }
void __tsan_unaligned_read4(void* at) { access<false, 0>(at, 4, false); }
void __tsan_unaligned_read8(void* at) { access<false, 0>(at, 8, false); }
void __tsan_unaligned_read16(void* at) { access<false, 0>(at, 16, false); }
void __tsan_unaligned_write2(void* at) { access<true, 0>(at, 2, false); }
void __tsan_unaligned_write4(void* at) { access<true, 0>(at, 4, false); }
void __tsan_unaligned_write8(void* at) { access<true, 0>(at, 8, false); }
void __tsan_unaligned_write16(void* at) { access<true, 0>(at, 16, false); }
// Clang's, in place of the C library's.
void* __tsan_memcpy(void* to, const void* from, size_t n) {
    return access<false, 0>(from, n, false), access<true, 0>(to, n, false), memcpy(to, from, n);
}
void* __tsan_memmove(void* to, const void* from, size_t n) {
    return access<false, 0>(from, n, false), access<true, 0>(to, n, false), memmove(to, from, n);
}
void* __tsan_memset(void* to, int byte, size_t n) { return access<true, 0>(to, n, false), memset(to, byte, n); }
void __tsan_read_range(void* at, unsigned long n) { access<false, 0>(at, n, false); }
void __tsan_write_range(void* at, unsigned long n) { access<true, 0>(at, n, false); }
}
