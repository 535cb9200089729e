// A library with the functions that the GPU driver calls, over the host's memory: enough to see that they are
// called in an order that a GPU would accept. Of the image "fake image" it has a kernel that adds `add` to the number
// at `to`; of "fake model" it has every kernel, none of which computes: all tokens are 0, and all values finite.
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { OK = 0, INVALID = 1, OUT_OF_MEMORY = 2, NOT_FOUND = 500, CAPTURING = 900 };
typedef struct { uint32_t* to; uint32_t add, zeros; } Args;  // what a launch does: set so many words, or add to one
typedef struct { int capturing, pending, timed; } Stream;  // timed: events whose time will be asked for

typedef struct { int launches; Args args[1024]; } Graph;
typedef struct { Stream* after; int timed; } Event;
typedef struct { char name[64]; } Kernel;

static __thread int current;  // whether this thread entered the context
static Graph recorded;
static void land(void);
static void run(Args a) { if (a.zeros) memset(a.to, 0, 4 * a.zeros); else if (a.to) *a.to += a.add; }
static long allocated, pinned, contexts, streams, events, graphs, modules;
// What goes to the file CUDA_LOG: readings of the clock, and graphs that are launched.
static void note(const char* format, double number) {
    int log = getenv("CUDA_LOG") ? open(getenv("CUDA_LOG"), O_WRONLY | O_APPEND | O_CREAT, 0644) : -1;
    if (log >= 0) dprintf(log, format, number), close(log);
}

int cuInit(unsigned flags) { return flags ? INVALID : OK; }
int cuDriverGetVersion(int* v) { *v = 12040; return OK; }
int cuGetErrorName(int e, const char** s) { *s = e == OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR"; return OK; }
int cuGetErrorString(int e, const char** s) { (void)e; *s = "a made-up error"; return OK; }
int cuDeviceGetCount(int* n) { *n = 1; return OK; }
int cuDeviceGet(int* d, int i) { *d = 7; return i == 0 ? OK : INVALID; }
int cuDeviceGetName(char* s, int n, int d) { snprintf(s, n, "Fake %d", d); return OK; }
int cuDeviceGetAttribute(int* v, int a, int d) {
    *v = a == 16 ? 4 : a == 97 ? 101376 : a == 75 ? 8 : a == 76 ? 6 : -1;
    return d == 7 ? OK : INVALID;
}
int cuDeviceTotalMem_v2(size_t* n, int d) { *n = 1 << 28; return d == 7 ? OK : INVALID; }
int cuDevicePrimaryCtxRetain(void** c, int d) { contexts++; *c = &contexts; return d == 7 ? OK : INVALID; }
int cuDevicePrimaryCtxRelease_v2(int d) {
    contexts--;
    // What is left when the last one closes the context is a leak.
    printf("left: %ld bytes, %ld pinned, %ld streams, %ld events, %ld graphs, %ld modules, %ld contexts\n", allocated, pinned,
           streams, events, graphs, modules, contexts);
    fflush(stdout);
    return d == 7 ? OK : INVALID;
}
int cuCtxSetCurrent(void* c) { current = c == &contexts; return current ? OK : INVALID; }
int cuStreamCreate(Stream** s, unsigned flags) { streams++; *s = calloc(1, sizeof **s); return current && flags == 1 ? OK : INVALID; }
int cuStreamDestroy_v2(Stream* s) { streams--; free(s); return current ? OK : INVALID; }
// What the clock says has passed by then.
int cuStreamSynchronize(Stream* s) { if (s->timed) usleep(2000); s->timed = s->pending = 0; return !current ? INVALID : s->capturing ? CAPTURING : OK; }
int cuStreamBeginCapture_v2(Stream* s, int mode) { recorded.launches = 0; s->capturing = 1; return current && mode == 1 ? OK : INVALID; }
static Stream *forked, *origin;  // a stream that takes part in what another records, until that waits for it
int cuStreamWaitEvent(Stream* s, Event* e, unsigned flags) {
    if (!current || flags || !e->after) return INVALID;
    if (forked && e->after == forked && s == origin) return forked->capturing = 0, forked = 0, OK;
    if (s->capturing && !e->after->capturing) return CAPTURING;
    if (e->after->capturing && !s->capturing) forked = s, origin = e->after, s->capturing = 1;
    return OK;
}
int cuStreamEndCapture(Stream* s, Graph** g) {
    if (!s->capturing || forked) return INVALID;
    s->capturing = 0, graphs++;
    *g = malloc(sizeof **g), **g = recorded;
    return OK;
}
int cuGraphInstantiateWithFlags(Graph** e, Graph* g, unsigned long long flags) { graphs++; *e = malloc(sizeof **e), **e = *g; return flags ? INVALID : OK; }
int cuGraphDestroy(Graph* g) { graphs--; free(g); return OK; }
int cuGraphExecDestroy(Graph* g) { graphs--; free(g); return OK; }
int cuGraphLaunch(Graph* g, Stream* s) {
    land(), note("replay of %.0f\n", g->launches), s->timed = 1;
    for (int i = 0; i < g->launches; i++) run(g->args[i]);
    return current && !s->capturing ? OK : INVALID;
}
int cuMemGetInfo_v2(size_t* f, size_t* t) { *t = 1 << 28, *f = *t - allocated; return current ? OK : INVALID; }
int cuMemAlloc_v2(uint64_t* p, size_t n) {
    if (!current || !n) return INVALID;
    if (allocated + n > 1 << 28) return OUT_OF_MEMORY;
    // The length stands in front, so that it can be taken back.
    char* at = aligned_alloc(256, 256 + (n + 255) / 256 * 256);
    memcpy(at, &n, sizeof n), allocated += n, *p = (uint64_t)(at + 256);
    return OK;
}
int cuMemFree_v2(uint64_t p) { char* at = (char*)p - 256; size_t n; memcpy(&n, at, sizeof n), allocated -= n, free(at); return current ? OK : INVALID; }
static struct { char* at; size_t n; } pins[8];
int cuMemAllocHost_v2(void** p, size_t n) {
    int i = 0;
    while (i < 8 && pins[i].at) i++;
    if (!current || i == 8) return INVALID;
    pinned++, *p = pins[i].at = malloc(n), pins[i].n = n;
    return OK;
}
int cuMemFreeHost(void* p) {
    for (int i = 0; i < 8; i++) if (pins[i].at == p) pins[i].at = 0;
    pinned--, free(p);
    return current ? OK : INVALID;
}
static int is_pinned(const char* p, size_t n) {
    for (int i = 0; i < 8; i++) if (pins[i].at && p >= pins[i].at && p + n <= pins[i].at + pins[i].n) return 1;
    return 0;
}

// Copies to the device are late: they are made when their event is waited for, or when what comes after them in the
// stream is, as late as a GPU might. Only pinned memory is copied from and to: from any other, a copy waits for the host.
static struct { void* to; const void* from; size_t n; Event* event; } late[2];
static int lates;
static void land(void) { for (int i = 0; i < lates; i++) memcpy(late[i].to, late[i].from, late[i].n); lates = 0; }
int cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t n, Stream* s) {
    if (!current || s->capturing || !is_pinned(from, n)) return INVALID;
    if (lates == 2) land();
    late[lates].to = (void*)to, late[lates].from = from, late[lates].n = n, lates++;
    return OK;
}
int cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t n, Stream* s) {
    if (!is_pinned(to, n)) return INVALID;
    land(), s->pending = 1, memcpy(to, (void*)from, n);
    return current ? OK : INVALID;
}
int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t n, Stream* s) { land(); memcpy((void*)to, (void*)from, n); return current && !s->capturing ? OK : INVALID; }
int cuMemsetD8Async(uint64_t to, unsigned char b, size_t n, Stream* s) { land(); memset((void*)to, b, n); return current && !s->capturing ? OK : INVALID; }
int cuEventCreate(Event** e, unsigned flags) { events++, *e = calloc(1, sizeof **e), (*e)->timed = !flags; return current && (flags == 2 || flags == 0) ? OK : INVALID; }
// Every reading of the clock is known again: fifteen microseconds, and from reading to reading a tenth of one more.
int cuEventElapsedTime_v2(float* ms, Event* a, Event* b) {
    static int readings;
    *ms = 0.015f + 0.0001f * (readings++ % 40);
    note("took %.9g\n", *ms);
    return current && a->timed && b->timed && a->after && b->after ? OK : INVALID;
}
int cuEventDestroy_v2(Event* e) { events--, free(e); return OK; }
int cuEventRecord(Event* e, Stream* s) { e->after = s, s->timed |= e->timed; return OK; }
// The time of a recorded event can be asked for only if it is external to the recording.
int cuEventRecordWithFlags(Event* e, Stream* s, unsigned flags) { e->after = s, s->timed |= e->timed; return current && flags == (unsigned)s->capturing ? OK : INVALID; }
// What the clock says has passed by then.
int cuEventSynchronize(Event* e) { if (e->timed) usleep(2000); if (e->after) land(); return current ? OK : INVALID; }
static char image_of[2];  // a module is one of these: that of the image, that of the model
int cuModuleLoadData(void** m, const void* image) {
    if (!current || (uintptr_t)image % 8) return INVALID;
    modules++, *m = &image_of[!memcmp(image, "fake model", 10)];
    return memcmp(image, "fake", 4) ? INVALID : OK;
}
int cuModuleUnload(void* m) { modules--; return (m == &image_of[0] || m == &image_of[1]) && current ? OK : INVALID; }
static Kernel kernels[64];
static int is(const Kernel* f, const char* name) { return !strncmp(f->name, name, strlen(name)); }
int cuModuleGetFunction(Kernel** f, char* m, const char* name) {
    int known = m == &image_of[1] || !strcmp(name, "add_bf16") || !strcmp(name, "sweep"), i = 0;
    if (m != &image_of[0] && m != &image_of[1]) return INVALID;
    if (!known) return NOT_FOUND;
    while (i < 64 && *kernels[i].name && strcmp(kernels[i].name, name)) i++;
    if (i == 64 || strlen(name) >= sizeof kernels->name) return OUT_OF_MEMORY;
    *f = &kernels[i], strcpy(kernels[i].name, name);
    return OK;
}
int cuFuncSetAttribute(Kernel* f, int a, int v) { return f >= kernels && f < kernels + 64 && a == 8 && v == 101376 ? OK : INVALID; }
int cuLaunchKernel(Kernel* f, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz, unsigned shared, Stream* s,
                   void** params, void** extra) {
    if (!current || !x || !y || !z || !bx || bx > 1024 || by * bz != 1 || shared > 101376 || extra) return INVALID;
    if (is(f, "sweep")) return bx == 512 ? OK : INVALID;  // it empties caches before the clock starts; here are none
    if ((uintptr_t)params[0] % 64) return INVALID;  // as a tensor map would need it
    Args args = {0};
    if (is(f, "add_bf16")) {
        if (x * y * z != 6 || bx != 32 || shared != 64) return INVALID;
        args = *(Args*)params[0], args.zeros = 0;
    }
    // Its token, or its verdict, for each block.
    if (is(f, "sample")) args.to = ((uint32_t**)params[0])[3], args.zeros = x;
    if (is(f, "finite")) args.to = ((uint32_t**)params[0])[1], args.zeros = x;
    if (s->capturing && recorded.launches == 1024) return OUT_OF_MEMORY;
    if (s->capturing) recorded.args[recorded.launches++] = args;
    else land(), run(args);
    return OK;
}
