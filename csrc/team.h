// Threads that walk through one step together: the same code on each, work handed out item by item, barriers instead of fork and join.
//
// Which thread takes which item never changes a result: an item is computed the same way by all.
#pragma once
#include <omp.h>
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>
#else
#include <sched.h>
#endif

#include "vector.h"

namespace shoal::SHOAL_ISA {

struct alignas(64) Counter {
    int64_t value = 0;
};

struct Team {
    int size;
    Counter next[4];  // items handed out in this phase and the three after it
    Counter arrived;
    alignas(64) int32_t phase = 0;
    alignas(64) int32_t sleepers = 0;
};

// One thread of a team.
class Member {
  public:
    SHOAL_INLINE_MEMBER Member(Team& team, int index) : team_(team), index_(index) {}

    SHOAL_INLINE_MEMBER int index() const { return index_; }
    SHOAL_INLINE_MEMBER int size() const { return team_.size; }

    // work(item) for every item in [0, count), each on some thread; returns on all threads when all are done.
    template <class Work>
    SHOAL_INLINE_MEMBER void each(int64_t count, Work work) {
        int64_t* next = &team_.next[phase_ & 3].value;
        for (int64_t item; (item = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED)) < count;) work(item);
        barrier();
    }

  private:
    Team& team_;
    int index_;
    int32_t phase_ = 0;

    SHOAL_INLINE_MEMBER void barrier() {
        ++phase_;
        if (__atomic_add_fetch(&team_.arrived.value, 1, __ATOMIC_ACQ_REL) == team_.size) {
            team_.arrived.value = 0;
            team_.next[(phase_ + 1) & 3].value = 0;  // nobody hands out of it before the next barrier
            __atomic_store_n(&team_.phase, phase_, __ATOMIC_SEQ_CST);
            if (__atomic_load_n(&team_.sleepers, __ATOMIC_SEQ_CST)) wake(team_);
            return;
        }
        // Spinning is fastest while every thread has a core. Where another program took one, the thread that we wait for may need ours:
        // asleep we leave it, and get it back at once when woken, which cannot be said of sched_yield.
        const int patience = 1 << 12;
        for (int spins = 0; __atomic_load_n(&team_.phase, __ATOMIC_ACQUIRE) != phase_; ++spins) {
            if (spins > patience)
                sleep(team_, phase_ - 1);
            else
                pause();
        }
    }

    // Until the phase is no longer `phase`, or for no reason.
    static void sleep(Team& team, int32_t phase) {
#if defined(__linux__)
        __atomic_add_fetch(&team.sleepers, 1, __ATOMIC_SEQ_CST);
        syscall(SYS_futex, &team.phase, FUTEX_WAIT_PRIVATE, phase, nullptr, nullptr, 0);
        __atomic_sub_fetch(&team.sleepers, 1, __ATOMIC_SEQ_CST);
#else
        sched_yield();
#endif
    }

    static void wake(Team& team) {
#if defined(__linux__)
        syscall(SYS_futex, &team.phase, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
#endif
    }

    SHOAL_INLINE_MEMBER static void pause() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }
};

}  // namespace shoal::SHOAL_ISA
