// Switching between stacks: assembly on x86-64, ucontext elsewhere; both with the address sanitizer kept informed.
#pragma once
#include <cstddef>

#if !defined(__x86_64__) || defined(FUSIONOPS_HOST_UCONTEXT)
#define FUSIONOPS_HOST_SWAP_BY_UCONTEXT
#include <ucontext.h>
#endif

#ifdef __SANITIZE_ADDRESS__
#include <pthread.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace fusionops_host {

using Start = void (*)();

// A flow of control that stands still; swap stops one and lets another continue.
#ifdef FUSIONOPS_HOST_SWAP_BY_UCONTEXT

struct Context {
    ucontext_t state;

    void prepare(char* stack, size_t bytes, Start start) {
        getcontext(&state);
        state.uc_stack.ss_sp = stack;
        state.uc_stack.ss_size = bytes;
        state.uc_link = nullptr;
        makecontext(&state, start, 0);
    }
    static void swap(Context& stopped, Context& continued) { swapcontext(&stopped.state, &continued.state); }
};

#else

// Saves what a callee has to preserve under the System V ABI; its caller has saved the rest.
extern "C" void fusionops_host_swap(void** stopped, void* continued) __attribute__((visibility("hidden")));
asm(R"(
    .text
    .hidden fusionops_host_swap
    .globl fusionops_host_swap
    .type fusionops_host_swap, @function
fusionops_host_swap:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size fusionops_host_swap, .-fusionops_host_swap
)");

struct Context {
    void* stack_pointer;

    void prepare(char* stack, size_t bytes, Start start) {
        void** top = reinterpret_cast<void**>(stack + bytes);
        *--top = nullptr;  // the return address of start, which aligns the stack as a call would
        *--top = reinterpret_cast<void*>(start);
        for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
        stack_pointer = top;
    }
    static void swap(Context& stopped, Context& continued) {
        fusionops_host_swap(&stopped.stack_pointer, continued.stack_pointer);
    }
};

#endif

// A context on its stack. The address sanitizer wants to be told when the stack changes.
struct Strand {
    Context context;
    char* stack;
    size_t bytes;
    void* fake_stack;

    static void swap(Strand& stopped, Strand& continued, [[maybe_unused]] bool for_ever = false) {
#ifdef __SANITIZE_ADDRESS__
        __sanitizer_start_switch_fiber(for_ever ? nullptr : &stopped.fake_stack, continued.stack, continued.bytes);
#endif
        Context::swap(stopped.context, continued.context);
        arrived(stopped.fake_stack);
    }
    static void arrived([[maybe_unused]] void* fake_stack = nullptr) {
#ifdef __SANITIZE_ADDRESS__
        __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
    }
    void find_stack_of_os_thread() {
#ifdef __SANITIZE_ADDRESS__
        pthread_attr_t attributes;
        void* lowest;
        pthread_getattr_np(pthread_self(), &attributes);
        pthread_attr_getstack(&attributes, &lowest, &bytes);
        pthread_attr_destroy(&attributes);
        stack = static_cast<char*>(lowest);
#endif
    }
};

}  // namespace fusionops_host
