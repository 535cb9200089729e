// Numbered sites. A site is a file, a line and a kind; it gets its number when a launch first reaches it.
#include "device.h"
#include <deque>
#include <mutex>
#include <string.h>

namespace emu {
namespace {

std::mutex lock;

std::deque<Site>& sites() {  // a deque: its elements never move
    static std::deque<Site> all;
    return all;
}

const Site* find_or_add(const char* file, int line, const char* kind) {
    const char* from = nullptr;  // the compiler's path, from kernels/ on
    for (const char* p = file; (p = strstr(p, "kernels/")); p++) from = p;
    std::string name = std::string(from ? from : file) + ":" + std::to_string(line) + " " + kind;
    std::lock_guard<std::mutex> guard(lock);
    for (const Site& s : sites())
        if (s.name == name) return &s;
    sites().push_back({name, (int)sites().size()});
    return &sites().back();
}

struct Entry {
    const char* file;
    int line;
    const char* kind;
    const Site* site;
};
thread_local Entry seen[256] EMU_TLS;

}  // namespace

const Site* site(const char* file, int line, const char* kind) {
    Entry& e = seen[((uintptr_t)file / 8 ^ (uintptr_t)kind ^ (uintptr_t)line * 7) % 256];
    if (__builtin_expect(e.file != file || e.line != line || e.kind != kind, 0))
        e = {file, line, kind, find_or_add(file, line, kind)};
    return e.site;
}

const Site* site(int id) {
    std::lock_guard<std::mutex> guard(lock);
    return id >= 0 && (size_t)id < sites().size() ? &sites()[(size_t)id] : nullptr;
}

}  // namespace emu

size_t emu_sites(void) {
    std::lock_guard<std::mutex> guard(emu::lock);
    return emu::sites().size();
}

const char* emu_site(size_t id) {
    const emu::Site* s = emu::site((int)id);
    return s ? s->name.c_str() : nullptr;
}
