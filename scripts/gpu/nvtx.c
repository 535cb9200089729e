// The least of a profiler: a library for NVTX_INJECTION64_PATH that appends a line to the file NVTX_LOG for each range
// that begins or ends. `cc -shared -fPIC` makes it; the declarations are those of NVTX 3, whose headers it does without.
// It asks for what NVIDIA's own (CUPTI 12.9) asks for, and refuses whoever lacks it, as that does.
#include <fcntl.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

enum { CALLBACKS = 1, VERSION_INFO = 3, PUSH_A = 9, POP = 11 };
enum { CORE = 1, CUDA = 2, CUDART = 4, CORE2 = 5, SYNC = 6 };
typedef void (*Function)(void);
typedef struct { size_t size; int (*module)(int module, Function*** table, unsigned* count); } Callbacks;
typedef struct { size_t size; uint32_t version, reserved; void (*set)(uint32_t version); } VersionInfo;

static int log_file = -1;
static __thread int depth;

// A line is written at once, so that others may write to the same file in between.
static void line(const char* what, const char* name) {
    char text[512];
    int n = snprintf(text, sizeof text, "%s%s%s\n", what, *name ? " " : "", name);
    if (n > 0 && write(log_file, text, n < (int)sizeof text ? n : (int)sizeof text - 1) < 0) abort();
}

static int push(const char* name) { line("push", name); return depth++; }
static int pop(void) { line("pop", ""); return depth > 0 ? --depth : -2; }

int InitializeInjectionNvtx2(const void* (*table)(uint32_t)) {
    const int others[] = {CORE2, SYNC, CUDA, CUDART};
    const VersionInfo* version = table(VERSION_INFO);
    const Callbacks* callbacks = table(CALLBACKS);
    Function** functions;
    unsigned count;
    if (!version || version->version < 3 || !callbacks || callbacks->size < sizeof *callbacks) return 0;
    version->set(3);
    for (int i = 0; i < 4; i++)
        if (!callbacks->module(others[i], &functions, &count)) return 0;
    if (!callbacks->module(CORE, &functions, &count) || count <= POP) return 0;
    const char* path = getenv("NVTX_LOG");
    if (!path || (log_file = open(path, O_WRONLY | O_APPEND | O_CREAT, 0644)) < 0) return 0;
    *functions[PUSH_A] = (Function)push;
    *functions[POP] = (Function)pop;
    return 1;
}
