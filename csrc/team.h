// Threads that walk through one step together: the same code on each, work handed out item by item, barriers instead of fork and join.
//
// Every thread has a share of neighbouring items and takes them in order: weights are read fastest in one long stretch. Whoever has finished
// helps the others from the end of theirs. Which thread takes which item never changes a result: an item is computed the same way by all.
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

#include <vector>

#include "vector.h"

namespace shoal::SHOAL_ISA {

// What has been taken of one thread's share: the phase (20 bits), items from the front (22) and from the back (22).
struct alignas(64) Taken {
    uint64_t value = 0;
};

struct Team {
    explicit Team(int threads) : size(threads), taken(threads) {}
    int size;
    std::vector<Taken> taken;
    alignas(64) int32_t arrived = 0;
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
        runs(count, 1, [&](int64_t item, int64_t) { work(item); });
    }

    // The same, for work(begin, end) on up to `longest` neighbouring items at once: fewer as a share comes to its end.
    template <class Work>
    SHOAL_INLINE_MEMBER void runs(int64_t count, int64_t longest, Work work) {
        if (team_.size == 1) {  // nobody to share with or to wait for
            for (int64_t begin = 0; begin < count; begin += longest) work(begin, begin + longest < count ? begin + longest : count);
            return;
        }
        const int64_t most = kMask * team_.size;  // items whose shares can be counted
        for (int64_t first = 0; first < count; first += most) {
            const int64_t some = smaller(most, count - first);
            for (int i = 0; i < team_.size; ++i) {
                const int whose = (index_ + i) % team_.size;
                for (Run run; (run = take(whose, some, longest)).begin < run.end;) work(first + run.begin, first + run.end);
            }
            barrier();
        }
    }

  private:
    static constexpr int kBits = 22;
    static constexpr int64_t kMask = (int64_t{1} << kBits) - 1;

    Team& team_;
    int index_;
    int32_t phase_ = 0;

    struct Run {
        int64_t begin, end;
    };

    // Of a thread's share: for itself, half of what is left, but at most `longest` items, from the front; for others one from the back.
    SHOAL_INLINE_MEMBER Run take(int whose, int64_t count, int64_t longest) {
        const int64_t first = count * whose / team_.size, length = count * (whose + 1) / team_.size - first;
        const uint64_t fresh = static_cast<uint64_t>(phase_) << 2 * kBits;  // nothing is taken: what is there may be of an earlier phase
        uint64_t* word = &team_.taken[whose].value;
        for (uint64_t seen = __atomic_load_n(word, __ATOMIC_RELAXED);;) {
            const uint64_t now = (seen ^ fresh) >> 2 * kBits ? fresh : seen;
            const int64_t front = now >> kBits & kMask, left = length - front - (now & kMask);
            if (left <= 0) return {0, 0};
            const int64_t half = (left + 1) / 2, taken = whose != index_ ? 1 : half < longest ? half : longest;
            const uint64_t then = now + (whose == index_ ? static_cast<uint64_t>(taken) << kBits : 1);
            if (__atomic_compare_exchange_n(word, &seen, then, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
                const int64_t begin = first + (whose == index_ ? front : front + left - 1);
                return {begin, begin + taken};
            }
        }
    }

    SHOAL_INLINE_MEMBER void barrier() {
        ++phase_;
        if (__atomic_add_fetch(&team_.arrived, 1, __ATOMIC_ACQ_REL) == team_.size) {
            team_.arrived = 0;
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
