// Device memory and its shadow, and the C interface to them.
#include "device.h"
#include <algorithm>
#include <string.h>
#include <sys/mman.h>
#ifdef __linux__
#include <link.h>
#endif

namespace emu {
namespace {

void* map(size_t bytes, int protection) {
    void* at = mmap(nullptr, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return at == MAP_FAILED ? nullptr : at;
}

size_t cells(const Memory& m) { return (m.bytes + 1) / 2; }
size_t shadow_bytes(const Memory& m) { return std::max<size_t>(1, cells(m) * 2 * (sizeof(Time) + sizeof(Who))); }

constexpr size_t PAGE_BYTES = 4096;
size_t whole_pages(size_t n) { return (n + PAGE_BYTES - 1) / PAGE_BYTES * PAGE_BYTES; }

int failed(Device* d, std::string text) {
    d->error = std::move(text);
    return 1;
}

// The allocation that holds all of [at, at + n), or null with an error.
Memory* whole(Device* d, const void* at, size_t n, const char* verb) {
    Memory* m = d->find(at);
    auto* p = (const unsigned char*)at;
    if (m && p >= m->base && (size_t)(p - m->base) <= m->bytes && n <= m->bytes - (size_t)(p - m->base)) return m;
    char text[200];
    snprintf(text, sizeof text, "%s %zu bytes at %p: ", verb, n, at);
    failed(d, text + (m ? "not within " + m->what + " (" + std::to_string(m->bytes) + " bytes)"
                        : std::string("no memory of this device")));
    return nullptr;
}

void mark(Memory& m, size_t offset, size_t n, bool written) {
    for (size_t i = offset; i < offset + n;) {
        if (i % 2 == 0 && i + 2 <= offset + n) {
            size_t end = i / 2 + (offset + n - i) / 2;
            std::fill(m.writer + i / 2, m.writer + end, written ? BYTES : 0);
            i = end * 2;
        } else {
            Who bit = i % 2 ? HIGH_BYTE : LOW_BYTE;
            m.writer[i / 2] = written ? m.writer[i / 2] | bit : m.writer[i / 2] & ~bit;
            i++;
        }
    }
}

struct Range {
    uintptr_t begin, end;
};

// The program's segments that nobody can write. On a system other than Linux, a kernel with a table of constants
// needs this written first.
std::vector<Range> find_constants() {
    std::vector<Range> found;
#ifdef __linux__
    auto add = [](dl_phdr_info* info, size_t, void* found) -> int {
        for (int i = 0; i < info->dlpi_phnum; i++) {
            const auto& part = info->dlpi_phdr[i];
            uintptr_t begin = info->dlpi_addr + part.p_vaddr;
            if (part.p_type == PT_GNU_RELRO || (part.p_type == PT_LOAD && !(part.p_flags & PF_W)))
                ((std::vector<Range>*)found)->push_back({begin, begin + part.p_memsz});
        }
        return 0;
    };
    dl_iterate_phdr(add, &found);
#endif
    return found;
}

bool is_written(const Memory& m, size_t byte) { return m.writer[byte / 2] & (byte % 2 ? HIGH_BYTE : LOW_BYTE); }

}  // namespace

bool shadow_map(Memory& m) {
    auto* at = (unsigned char*)map(shadow_bytes(m), PROT_READ | PROT_WRITE);
    if (!at) return false;
    m.wrote = (Time*)at;
    m.read = m.wrote + cells(m);
    m.writer = (Who*)(m.read + cells(m));
    m.reader = m.writer + cells(m);
    return true;
}

void shadow_unmap(Memory& m) {
    if (m.wrote) munmap(m.wrote, shadow_bytes(m));
    m.wrote = nullptr;
}

bool is_constant(const void* at, size_t n) {
    static const std::vector<Range> constants = find_constants();
    auto begin = (uintptr_t)at;
    for (const Range& range : constants)
        if (begin >= range.begin && begin + n <= range.end) return true;
    return false;
}

}  // namespace emu

using namespace emu;

emu_device* emu_open(uint64_t seed) {
    std::unique_ptr<emu_device> d(new emu_device);
    // 256 GiB of addresses, or what the system gives; memory is behind them only where an allocation is.
    for (size_t slots = 16384; slots >= 64 && !d->space; slots /= 2) {
        d->space = (unsigned char*)map(slots * SLOT, PROT_NONE);
        d->slots = slots;
    }
    if (!d->space) return nullptr;
    d->table.assign(d->slots, nullptr);
    emu_seed(d.get(), seed);
    return d.release();
}

void emu_close(emu_device* d) {
    for (size_t i = 0; i < d->slots; i++)
        if (d->table[i]) emu_free(d, d->table[i]->base);
    munmap(d->space, d->slots * SLOT);
    delete d;
}

void emu_seed(emu_device* d, uint64_t seed) {
    d->random.state = seed * 0x9e3779b97f4a7c15ull + 0x2545f4914f6cdd1dull;
    if (!d->random.state) d->random.state = 1;
    d->random();
}

void* emu_alloc(emu_device* d, size_t bytes, const char* what) {
    if (bytes > d->slots * SLOT) return nullptr;
    // Half a slot stays free after it, and before it some 256 bytes at least, so that neighbours are far.
    size_t lead = 256 * (1 + d->random.below(16)), wanted = (lead + bytes + SLOT / 2 + SLOT - 1) / SLOT;
    size_t slot = d->next_slot, run = 0, tried = 0;
    for (; run < wanted; tried++) {  // the next free run, round and round: a freed place stays empty for long
        if (tried > 2 * d->slots) return nullptr;
        if (slot + wanted > d->slots) slot = run = 0;
        if (d->table[slot + run]) slot += run + 1, run = 0;
        else run++;
    }
    std::unique_ptr<Memory> m(new Memory);
    m->base = d->space + slot * SLOT + lead;
    m->bytes = bytes;
    m->what = std::string("`") + (what ? what : "?") + "`";
    if (mprotect(d->space + slot * SLOT, whole_pages(lead + bytes), PROT_READ | PROT_WRITE)) return nullptr;
    if (!shadow_map(*m)) return nullptr;
    memset(m->base, POISON, bytes);
    unsigned char* base = m->base;
    Memory* raw = m.release();
    for (size_t i = 0; i < wanted; i++) d->table[slot + i] = raw;
    d->next_slot = slot + wanted;
    return base;
}

void emu_free(emu_device* d, void* at) {
    Memory* m = d->find(at);
    if (!m || m->base != at) return;
    size_t slot = (size_t)((unsigned char*)at - d->space) / SLOT;
    unsigned char* begin = d->space + slot * SLOT;
    mmap(begin, whole_pages((size_t)(m->base - begin) + m->bytes), PROT_NONE,
         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    for (; slot < d->slots && d->table[slot] == m; slot++) d->table[slot] = nullptr;
    shadow_unmap(*m);
    delete m;
}

int emu_upload(emu_device* d, void* to, const void* from, size_t n) {
    Memory* m = whole(d, to, n, "upload of");
    if (!m) return 1;
    if (n) memcpy(to, from, n);
    mark(*m, (size_t)((unsigned char*)to - m->base), n, true);
    return 0;
}

int emu_download(emu_device* d, void* to, const void* from, size_t n) {
    Memory* m = whole(d, from, n, "download of");
    if (!m) return 1;
    size_t offset = (size_t)((const unsigned char*)from - m->base);
    for (size_t i = offset; i < offset + n; i++)
        if (!is_written(*m, i))
            return failed(d, "download of " + std::to_string(n) + " bytes at offset " + std::to_string(offset) +
                                 " of " + m->what + ": nothing has written the byte at offset " + std::to_string(i));
    if (n) memcpy(to, from, n);
    return 0;
}

int emu_copy(emu_device* d, void* to, const void* from, size_t n) {
    Memory* source = whole(d, from, n, "copy from");
    Memory* target = source ? whole(d, to, n, "copy to") : nullptr;
    if (!target) return 1;
    size_t read = (size_t)((const unsigned char*)from - source->base),
           write = (size_t)((unsigned char*)to - target->base);
    std::vector<bool> written(n);
    for (size_t i = 0; i < n; i++) written[i] = is_written(*source, read + i);
    memmove(to, from, n);
    for (size_t i = 0; i < n; i++) mark(*target, write + i, 1, written[i]);
    return 0;
}

int emu_fill(emu_device* d, void* to, int byte, size_t n) {
    Memory* m = whole(d, to, n, "fill of");
    if (!m) return 1;
    memset(to, byte, n);
    mark(*m, (size_t)((unsigned char*)to - m->base), n, true);
    return 0;
}

int emu_forget(emu_device* d, void* at, size_t n) {
    Memory* m = whole(d, at, n, "forgetting");
    if (!m) return 1;
    memset(at, POISON, n);
    mark(*m, (size_t)((unsigned char*)at - m->base), n, false);
    return 0;
}

const char* emu_error(const emu_device* d) { return d->error.c_str(); }
void emu_switch_off(emu_device* d, int site) { d->off = site; }

void emu_stats(const emu_device* d, uint64_t* launches, uint64_t* barriers, uint64_t* accesses) {
    if (launches) *launches = d->launches;
    if (barriers) *barriers = d->barriers;
    if (accesses) *accesses = d->accesses;
}
