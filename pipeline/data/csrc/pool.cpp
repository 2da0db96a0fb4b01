#include "pool.h"

#include <algorithm>
#include <cstring>

namespace noisynn {

Pool::Pool(int threads) : callers_work_(threads == 0) {
    try {
        for (int i = 0; i < threads; ++i) threads_.emplace_back([this] { work(); });
    } catch (...) {
        close();
        throw;
    }
}

void Pool::submit(Job* job) {
    std::lock_guard lock(mutex_);
    if (closed_) {
        std::fill_n(job->status, job->count, ask_reference);
        std::memset(job->out, 0, size_t(job->count) * 3 * job->view.size * job->view.size);
        job->begun = job->done = job->count;
    } else if (job->count > 0) {
        jobs_.push_back(job);
        submitted_.notify_all();
    }
}

void Pool::wait(Job* job) {
    std::unique_lock lock(mutex_);
    if (callers_work_) {
        thread_local Workspace workspace;
        while (job->done < job->count && make_next(lock, workspace)) {
        }
    }
    finished_.wait(lock, [&] { return job->done == job->count; });
}

void Pool::close() {
    {
        std::lock_guard lock(mutex_);
        closed_ = true;
        for (Job* job : jobs_) {
            const int64_t left = job->count - job->begun;
            const size_t bytes = 3 * size_t(job->view.size) * job->view.size;
            std::fill_n(job->status + job->begun, left, ask_reference);
            std::memset(job->out + job->begun * bytes, 0, left * bytes);
            job->begun = job->count;
            job->done += left;
        }
        jobs_.clear();
        submitted_.notify_all();
        finished_.notify_all();
    }
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
}

void Pool::work() {
    Workspace workspace;
    std::unique_lock lock(mutex_);
    while (true) {
        submitted_.wait(lock, [&] { return closed_ || !jobs_.empty(); });
        if (closed_) return;
        while (make_next(lock, workspace)) {
        }
    }
}

bool Pool::make_next(std::unique_lock<std::mutex>& lock, Workspace& workspace) {
    if (jobs_.empty()) return false;
    Job* job = jobs_.front();
    const int64_t number = job->begun++;
    if (job->begun == job->count) jobs_.pop_front();
    lock.unlock();
    uint8_t* row = job->out + size_t(number) * 3 * job->view.size * job->view.size;
    const Status status = make_sample(job->items[number], job->view, workspace, row, job->crops + 5 * number);
    lock.lock();
    job->status[number] = status;
    if (++job->done == job->count) finished_.notify_all();
    return true;
}

}  // namespace noisynn
