// Stacks that take turns on one OS thread. A switch saves what a function call must preserve and no more:
// some 5 ns where swapcontext, which also saves the signal mask, takes 300.
#pragma once
#include <stddef.h>
#include <stdint.h>

#if defined(__x86_64__) || defined(__aarch64__)

// Saves the present stack at *from and continues on `to`.
extern "C" void fiber_switch(void** from, void* to) asm("emu_fiber_switch");

// The stack pointer that makes fiber_switch enter `entry`, which must not return. `top` is aligned to 16.
inline void* fiber_prepare(char* top, void (*entry)()) {
#ifdef __x86_64__
    constexpr int SAVED = 6;  // registers; then the return address, after which the stack is as after a call
    void** sp = (void**)top - (SAVED + 2);
    for (int i = 0; i < SAVED + 2; i++) sp[i] = nullptr;
    sp[SAVED] = (void*)entry;
#else
    constexpr int SAVED = 20;  // x19-x30, d8-d15
    void** sp = (void**)top - SAVED;
    for (int i = 0; i < SAVED; i++) sp[i] = nullptr;
    sp[11] = (void*)entry;  // x30
#endif
    return sp;
}

#else

#include <ucontext.h>
#include <new>

// Elsewhere a stack pointer is the address of a context that stands on its own stack.
inline void fiber_switch(void** from, void* to) {
    ucontext_t mine;
    *from = &mine;
    swapcontext(&mine, (ucontext_t*)to);
}

inline void* fiber_prepare(char* top, void (*entry)()) {
    constexpr size_t USABLE = (size_t)48 << 10;
    ucontext_t* context = new (top - sizeof(ucontext_t) - 64) ucontext_t;
    getcontext(context);
    context->uc_stack.ss_sp = (char*)context - USABLE;
    context->uc_stack.ss_size = USABLE;
    context->uc_link = nullptr;
    makecontext(context, entry, 0);
    return context;
}

#endif
