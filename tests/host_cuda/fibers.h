// The threads of a CUDA block as fibers of one OS thread: they switch only where CUDA threads wait for one another.
//
// A fiber runs until it waits, so a kernel that lacks a barrier computes something else in another order of threads.
// A block in which nobody can go on is reported, never waited for. Interface of fibers.cpp; knows no word of CUDA C.
#pragma once
#include <cstdint>

struct uint3 {
    unsigned x, y, z;
};

namespace fusionops_host {

constexpr unsigned WARP = 32, WARPGROUP = 128, THREADS_MAX = 1024, NAMED_BARRIERS = 16;

struct Launch {  // module._Launch is the same in ctypes
    uint3 grid, block;
    uint32_t shared_bytes;
    uint32_t order;       // of the threads: 0 forward, 1 reverse, else the seed of a random one, by warpgroups
    double patience_s;    // how long yield() may be called without progress
    uint64_t next_block;  // the OS threads of a launch draw their blocks from here
    uint64_t switches;    // between fibers, of all blocks
    uint32_t failed;
    char error[1020];  // of the first block that failed
};

struct Barrier {
    unsigned arrived, phase;
    unsigned expected;        // to arrive, and what for: all have to agree
    const void* purpose;
    unsigned votes, outcome;  // of this meeting so far; of the last one
    unsigned mask;            // of lanes, in use by a warp
};

struct Block;

struct alignas(64) Fiber {  // its first line is what a look at a waiting thread needs
    Fiber *next, *previous;      // ring of the threads that have not left the kernel
    bool (*ready)(const Fiber&);  // null when it can go on
    const void* question;         // for ready
    unsigned phase;               // for ready, at a barrier
    unsigned number;              // of the thread in its block
    Block* block;
    uint3 thread;
    const char* state;  // of one that waits or has left, for the report of a deadlock
    void* registers;    // what it shows to the others of a collective
    Barrier warp;       // one of those that its warp has: each lane may meet others, apart from the rest
};

struct Block {
    uint3 index, extent, grid;
    unsigned threads;
    char* shared;
    Barrier named[NAMED_BARRIERS];  // 0 is that of __syncthreads
    Barrier warpgroup[THREADS_MAX / WARPGROUP];
    Fiber fibers[THREADS_MAX];
};

extern __thread Fiber* current;  // of this OS thread

// Reports an error of the kernel and abandons the block.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Lets the other threads of the block go on. For loops that may also wait for another block; what waits for its own
// block uses wait_until, where a deadlock is seen at once and not after Launch::patience_s.
void yield();

void wait_until(bool (*ready)(const Fiber&), const void* question, const char* state);

// Waits for other threads of the block. `ready` is asked while other threads are current: it must not use threadIdx.
template <class Predicate>
void wait_until(const Predicate& ready, const char* state) {
    wait_until([](const Fiber& fiber) { return (*static_cast<const Predicate*>(fiber.question))(); }, &ready, state);
}

// A meeting: whoever arrives waits, but for the last, who may do something for all and then releases them.
bool arrive(Barrier& barrier, unsigned expected, const void* purpose, unsigned vote = 0);
void release(Barrier& barrier);
void wait(const Barrier& barrier, unsigned phase, const char* state);

// Returns how many threads of the block voted 1.
unsigned syncthreads(unsigned vote = 0);

// The PTX instructions bar.sync and bar.arrive; `threads` counts both those that wait and those that only arrive.
void bar_sync(unsigned barrier, unsigned threads);
void bar_arrive(unsigned barrier, unsigned threads);

// The lanes of a mask that exist in the caller's warp; the caller has to be one of them.
unsigned lanes_of(unsigned mask);
Barrier& warp_barrier(unsigned lanes);

// The registers that the lanes of a warp or warpgroup brought to a collective.
template <class Registers>
struct Lanes {
    Fiber* first;
    unsigned mask;  // of those that take part; a warpgroup is complete

    Registers& operator[](unsigned lane) const {
        if (!(mask >> lane % WARP & 1)) fail("a collective needs lane %u, which does not take part in it", lane);
        return *static_cast<Registers*>(first[lane].registers);
    }
};

// Each lane brings its registers; the last to arrive executes operation(lanes) once, for all of them. So what differs
// from lane to lane belongs into the registers, results included.
template <class Registers, class Operation>
void collective(Barrier& barrier, Lanes<Registers> lanes, unsigned count, Registers& mine, const Operation& operation) {
    static const char purpose = 0;  // its address tells this operation from every other
    current->registers = &mine;
    if (arrive(barrier, count, &purpose)) {
        operation(lanes);
        release(barrier);
    } else {
        wait(barrier, barrier.phase, "wait at a collective");
    }
}

template <class Registers, class Operation>
void warp_collective(unsigned mask, Registers& mine, const Operation& operation) {
    const unsigned lanes = lanes_of(mask);
    Fiber* first = &current->block->fibers[current->number / WARP * WARP];
    collective(warp_barrier(lanes), Lanes<Registers>{first, lanes}, __builtin_popcount(lanes), mine, operation);
}

template <class Registers, class Operation>
void warpgroup_collective(Registers& mine, const Operation& operation) {
    const unsigned group = current->number / WARPGROUP;
    Fiber* first = &current->block->fibers[group * WARPGROUP];
    collective(current->block->warpgroup[group], Lanes<Registers>{first, ~0u}, WARPGROUP, mine, operation);
}

// Runs blocks of the launch, each of their threads as entry(arguments), until none is left or one has failed.
void run_blocks(Launch& launch, void (*entry)(const void*), const void* arguments);

}  // namespace fusionops_host
