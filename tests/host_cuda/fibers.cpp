// The scheduler behind fibers.h. Each OS thread has one Worker, which keeps its memory from launch to launch.
#include "fibers.h"

#include "strand.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <sys/mman.h>
#include <utility>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace fusionops_host {

__thread Fiber* current;

namespace {

constexpr size_t STACK_BYTES = 128 * 1024;  // room for 32 KB of parameters and for the red zones of a sanitizer
// Below each stack is room for the frame that overflows it; module.py lets no frame be larger. And stacks a power of
// two apart would compete for the same sets of the first-level cache.
constexpr size_t STACK_GAP = 64 * 1024 + 5 * 64;
constexpr size_t STACKS_BYTES = THREADS_MAX * (STACK_GAP + STACK_BYTES);
constexpr size_t SHARED_MAX = 227 * 1024;
constexpr size_t SHARED_MARGIN = 4096;       // on both sides
constexpr size_t STACK_MARGIN = 64;          // of the gap, at its upper end
constexpr unsigned char UNWRITTEN = 0xFF;    // NaN in every floating-point format
constexpr unsigned char UNTOUCHED = 0xFE;    // of margins
constexpr uint64_t UNTIMED_SPINS = 1 << 16;  // between two looks at the clock

char* map(size_t bytes) {  // pages that nobody touches take no memory
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) abort();
    return static_cast<char*>(memory);
}

bool is_untouched(const char* margin, size_t bytes) {  // equal to its neighbour, byte by byte
    return static_cast<unsigned char>(*margin) == UNTOUCHED && memcmp(margin, margin + 1, bytes - 1) == 0;
}

uint64_t random_number(uint64_t& state) {  // SplitMix64
    uint64_t z = state += 0x9E3779B97F4A7C15;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
    z = (z ^ z >> 27) * 0x94D049BB133111EB;
    return z ^ z >> 31;
}

double seconds() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec + 1e-9 * now.tv_nsec;
}

struct Worker {
    Block block{};
    Strand home{}, strands[THREADS_MAX]{};
    char* const stacks = map(STACKS_BYTES);
    char* const arena = map(SHARED_MAX + 2 * SHARED_MARGIN);
    Launch* launch{};
    void (*entry)(const void*){};
    const void* arguments{};
    uint64_t switches{}, spins{};
    double spinning_since_s{};

    Worker() {
        block.shared = arena + SHARED_MARGIN;
        home.find_stack_of_os_thread();
        for (size_t i = 0; i < THREADS_MAX; ++i) {
            strands[i].stack = stacks + i * (STACK_GAP + STACK_BYTES) + STACK_GAP;
            strands[i].bytes = STACK_BYTES;
        }
    }

    void run(uint64_t number, uint64_t blocks) {
        const uint64_t place = launch->order % 2 ? blocks - 1 - number : number;
        const uint3 grid = block.grid = launch->grid;
        block.index = {unsigned(place % grid.x), unsigned(place / grid.x % grid.y), unsigned(place / grid.x / grid.y)};
        prepare_memory();
        prepare_threads(number);
        Strand::swap(home, strands[current->number]);
        current = nullptr;
        check_memory();
    }

    void prepare_memory() {
        const size_t bytes = launch->shared_bytes;
#ifdef __SANITIZE_ADDRESS__
        __asan_unpoison_memory_region(arena, SHARED_MAX + 2 * SHARED_MARGIN);
#endif
        memset(arena, UNTOUCHED, SHARED_MARGIN);
        memset(block.shared, UNWRITTEN, bytes);
        memset(block.shared + bytes, UNTOUCHED, SHARED_MARGIN);
#ifdef __SANITIZE_ADDRESS__
        __asan_poison_memory_region(arena, SHARED_MARGIN);
        __asan_poison_memory_region(block.shared + bytes, SHARED_MARGIN);
#endif
    }

    void prepare_threads(uint64_t number) {
        const uint3 extent = block.extent = launch->block;
        const unsigned threads = block.threads = extent.x * extent.y * extent.z;
        memset(block.named, 0, sizeof block.named);
        memset(block.warpgroup, 0, sizeof block.warpgroup);
        unsigned order[THREADS_MAX];
        for (unsigned i = 0; i < threads; ++i) order[i] = launch->order == 1 ? threads - 1 - i : i;
        if (launch->order > 1) {
            uint64_t state = launch->order + (number << 32);
            for (unsigned i = threads; i > 1; --i) std::swap(order[i - 1], order[random_number(state) % i]);
        }
        for (unsigned i = 0; i < threads; ++i) {
            Fiber& fiber = block.fibers[i];
            fiber = {};
            fiber.thread = {i % extent.x, i / extent.x % extent.y, i / extent.x / extent.y};
            fiber.number = i;
            fiber.block = &block;
#ifdef __SANITIZE_ADDRESS__
            // Frames that were abandoned have left their red zones behind.
            __asan_unpoison_memory_region(strands[i].stack - STACK_GAP, STACK_GAP + STACK_BYTES);
#endif
            memset(strands[i].stack - STACK_MARGIN, UNTOUCHED, STACK_MARGIN);
            strands[i].context.prepare(strands[i].stack, strands[i].bytes, start);
        }
        for (unsigned i = 0; i < threads; ++i) {
            Fiber &fiber = block.fibers[order[i]], &next = block.fibers[order[(i + 1) % threads]];
            fiber.next = &next;
            next.previous = &fiber;
        }
        current = &block.fibers[order[0]];
        spins = 0;
    }

    void check_memory() {
        const size_t bytes = launch->shared_bytes;
#ifdef __SANITIZE_ADDRESS__
        __asan_unpoison_memory_region(arena, SHARED_MAX + 2 * SHARED_MARGIN);
#endif
        if (!is_untouched(arena, SHARED_MARGIN)) report("something wrote in front of the shared memory");
        const char *end = block.shared + bytes, *byte = end;
        if (!is_untouched(end, SHARED_MARGIN)) {
            while (static_cast<unsigned char>(*byte) == UNTOUCHED) ++byte;
            report("something wrote to byte %zu of %zu bytes of shared memory", byte - block.shared, bytes);
        }
        for (unsigned i = 0; i < block.threads; ++i)
            if (!is_untouched(strands[i].stack - STACK_MARGIN, STACK_MARGIN))
                report("thread number %u took more stack than its %zu bytes", i, STACK_BYTES);
    }

    // The first error of a launch is kept, and no further block begins.
    void report(const char* format, ...) __attribute__((format(printf, 2, 3))) {
        va_list values;
        va_start(values, format);
        report(format, values);
        va_end(values);
    }
    void report(const char* format, va_list values) {
        if (__atomic_exchange_n(&launch->failed, 1, __ATOMIC_ACQ_REL)) return;
        const auto [x, y, z] = block.index;
        char* const error = launch->error;
        const int prefix = snprintf(error, sizeof launch->error, "block (%u, %u, %u): ", x, y, z);
        vsnprintf(error + prefix, sizeof launch->error - prefix, format, values);
    }

    [[noreturn]] void abandon() {
        Strand::swap(strands[current->number], home, true);
        __builtin_unreachable();
    }

    [[noreturn]] void report_deadlock() {
        char text[600] = "";
        size_t length = 0;
        for (unsigned i = 0; i < block.threads; ++i) {  // one line for all threads of the same state
            const char* state = block.fibers[i].state;
            unsigned count = 0, first = block.threads;
            for (unsigned j = block.threads; j-- > 0;)
                if (block.fibers[j].state == state) ++count, first = j;
            if (first < i || length >= sizeof text) continue;
            const auto [x, y, z] = block.fibers[i].thread;
            length += snprintf(text + length, sizeof text - length, "\n  %u of %u threads %s, the first is (%u, %u, %u)",
                               count, block.threads, state, x, y, z);
        }
        report("deadlock%s", text);
        abandon();
    }

    void count_spin() {
        if (++spins % UNTIMED_SPINS) return;
        if (spins == UNTIMED_SPINS) spinning_since_s = seconds();
        if (seconds() - spinning_since_s > launch->patience_s) report_deadlock();
    }

    // The first thread after the current one that can go on, the current one being the last that is asked. In a random
    // order a warpgroup runs as far as it can before another does: then one that has to wait for another, and does not,
    // is far ahead.
    Fiber& next_ready() {
        Fiber* const first = current->next;
        Fiber* fiber = first;
        if (launch->order > 1 && !spins) {
            const unsigned group = current->number / WARPGROUP;
            do {
                if (fiber->number / WARPGROUP == group && (!fiber->ready || fiber->ready(*fiber))) break;
                fiber = fiber->next;
            } while (fiber != first);
        }
        while (fiber->ready && !fiber->ready(*fiber)) {
            fiber = fiber->next;
            if (fiber == first) report_deadlock();
        }
        if (fiber->ready) spins = 0;
        fiber->ready = nullptr;
        return *fiber;
    }

    void pass_on(bool for_ever = false) {
        Fiber &stopped = *current, &continued = next_ready();
        if (&stopped == &continued) return;
        ++switches;
        current = &continued;
        Strand::swap(strands[stopped.number], strands[continued.number], for_ever);
    }

    [[noreturn]] void leave() {
        current->state = "have left the kernel";
        if (current->next == current) abandon();
        current->previous->next = current->next;
        current->next->previous = current->previous;
        spins = 0;
        pass_on(true);
        __builtin_unreachable();
    }

    static void start();
};

// Never freed: module.py runs launches on a few threads that last.
__thread Worker* worker;

void Worker::start() {
    Strand::arrived();
    worker->entry(worker->arguments);
    worker->leave();
}

}  // namespace

void fail(const char* format, ...) {
    char message[800];
    va_list values;
    va_start(values, format);
    vsnprintf(message, sizeof message, format, values);
    va_end(values);
    const auto [x, y, z] = current->thread;
    worker->report("thread (%u, %u, %u): %s", x, y, z, message);
    worker->abandon();
}

void yield() {
    current->state = "call yield()";
    worker->count_spin();
    worker->pass_on();
}

void wait_until(bool (*ready)(const Fiber&), const void* question, const char* state) {
    current->question = question;
    current->state = state;
    if (ready(*current)) return;
    current->ready = ready;
    worker->pass_on();
}

bool arrive(Barrier& barrier, unsigned expected, const void* purpose, unsigned vote) {
    if (barrier.arrived == 0) {
        barrier.expected = expected;
        barrier.purpose = purpose;
    }
    if (barrier.expected != expected) fail("threads expect to meet as %u and as %u", barrier.expected, expected);
    if (barrier.purpose != purpose) fail("threads meet in different collectives");
    barrier.votes += vote;
    return ++barrier.arrived == barrier.expected;
}

void release(Barrier& barrier) {
    barrier.outcome = barrier.votes;
    barrier.votes = barrier.arrived = 0;
    ++barrier.phase;
    worker->spins = 0;
}

void wait(const Barrier& barrier, unsigned phase, const char* state) {
    current->phase = phase;
    wait_until([](const Fiber& f) { return static_cast<const Barrier*>(f.question)->phase != f.phase; }, &barrier, state);
}

unsigned syncthreads(unsigned vote) {
    Barrier& barrier = current->block->named[0];
    const unsigned threads = current->block->threads;
    if (arrive(barrier, threads, nullptr, vote))
        release(barrier);
    else
        wait(barrier, barrier.phase, "wait at __syncthreads");
    return barrier.outcome;
}

void bar_arrive(unsigned number, unsigned threads) {
    if (number >= NAMED_BARRIERS) fail("barrier %u, the last is %u", number, NAMED_BARRIERS - 1);
    if (threads == 0 || threads % WARP) fail("barrier %u counts %u threads, not a multiple of %u", number, threads, WARP);
    Barrier& barrier = current->block->named[number];
    if (arrive(barrier, threads, nullptr)) release(barrier);
}

void bar_sync(unsigned number, unsigned threads) {
    const Barrier& barrier = current->block->named[number % NAMED_BARRIERS];
    const unsigned phase = barrier.phase;
    bar_arrive(number, threads);
    wait(barrier, phase, "wait at a named barrier");
}

unsigned lanes_of(unsigned mask) {
    const unsigned lane = current->number % WARP, existing = current->block->threads - (current->number - lane);
    if (!(mask >> lane & 1)) fail("lane %u calls with the mask %#x, which does not contain it", lane, mask);
    return existing < WARP ? mask & ((1u << existing) - 1) : mask;
}

// The one at which lanes of this mask have begun to meet, else one that is free.
Barrier& warp_barrier(unsigned lanes) {
    Fiber* const first = &current->block->fibers[current->number / WARP * WARP];
    Barrier* free = nullptr;
    for (unsigned lane = 0; lane < WARP; ++lane) {
        Barrier& barrier = first[lane].warp;
        if (barrier.arrived && barrier.mask == lanes) return barrier;
        if (!barrier.arrived && !free) free = &barrier;
    }
    free->mask = lanes;
    return *free;
}

void run_blocks(Launch& launch, void (*entry)(const void*), const void* arguments) {
    if (!worker) worker = new Worker;
    worker->launch = &launch;
    worker->entry = entry;
    worker->arguments = arguments;
    worker->switches = 0;
    const uint64_t blocks = uint64_t(launch.grid.x) * launch.grid.y * launch.grid.z;
    while (!__atomic_load_n(&launch.failed, __ATOMIC_ACQUIRE)) {
        const uint64_t number = __atomic_fetch_add(&launch.next_block, 1, __ATOMIC_RELAXED);
        if (number >= blocks) break;
        worker->run(number, blocks);
    }
    __atomic_fetch_add(&launch.switches, worker->switches, __ATOMIC_RELAXED);
}

}  // namespace fusionops_host

// What g++ calls under -fsanitize=alignment,bounds, in place of its own library: a device would not survive either.
// Layouts as in libsanitizer/ubsan/ubsan_handlers.h.
struct SourceLocation {
    const char* file;
    uint32_t line, column;
};

struct TypeDescriptor {
    uint16_t kind, info;
    char name[];
};

struct TypeMismatch {
    SourceLocation at;
    const TypeDescriptor& type;
    unsigned char log_alignment, access;
};

struct OutOfBounds {
    SourceLocation at;
    const TypeDescriptor &array, &index;
};

extern "C" void __ubsan_handle_type_mismatch_v1(const TypeMismatch* what, void* address) {
    fusionops_host::fail("%s:%u: address %p of a %s is not a multiple of %u", what->at.file, what->at.line, address,
                         what->type.name, 1u << what->log_alignment);
}

extern "C" void __ubsan_handle_out_of_bounds(const OutOfBounds* what, size_t index) {
    fusionops_host::fail("%s:%u: index %zd of a %s", what->at.file, what->at.line, index, what->array.name);
}
