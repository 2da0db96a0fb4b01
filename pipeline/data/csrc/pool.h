// Threads that make samples, for any number of batches at once.
#pragma once

#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "sample.h"

namespace noisynn {

struct Job {
    const Item* items;
    int64_t count;
    View view;
    uint8_t* out;
    int32_t *status, *crops;
    int64_t begun = 0, done = 0;  // samples; guarded by the pool's mutex
};

// Samples are begun in the order in which they were submitted, across batches: no thread idles at a batch's edge.
class Pool {
  public:
    explicit Pool(int threads);
    ~Pool() { close(); }

    void submit(Job* job);
    // Returns when all samples of the job are made; where there are no threads, the caller makes them.
    void wait(Job* job);
    // Ends the threads; samples that were not begun get the status ask_reference.
    void close();

  private:
    void work();
    // Makes the next sample, with the mutex given back meanwhile; false where there is none.
    bool make_next(std::unique_lock<std::mutex>& lock, Workspace& workspace);

    std::mutex mutex_;
    std::condition_variable submitted_, finished_;
    std::deque<Job*> jobs_;  // with samples that are not begun
    std::vector<std::thread> threads_;
    const bool callers_work_;  // there are no threads
    bool closed_ = false;
};

}  // namespace noisynn
