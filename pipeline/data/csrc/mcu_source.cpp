#include "mcu_source.h"

#include <algorithm>
#include <cstring>

namespace noisynn {
namespace {

constexpr size_t kSlots = 6;

}  // namespace

void McuSource::make_room(const Scan& scan) {
    longest_ = 0;
    for (const Unit& unit : scan.units)
        longest_ = std::max(longest_, unit.wanted + (scan.independent ? unit.skipped : 0));
    slots_ = scan.independent ? kSlots : 1;
    coefficients_.take(slots_ * size_t(longest_) * kMaxMcuBlocks * kBlock * sizeof(int16_t));
}

void McuSource::begin(const McuPlan& plan, const Scan& scan) {
    plan_ = &plan, scan_ = &scan, kernels_ = &entropy_kernels();
    slot_size_ = size_t(longest_) * plan.blocks * kBlock;
    std::memset(coefficients_.data(), 0, slots_ * slot_size_ * sizeof(int16_t));
    unit_ = begun_ = 0;
    left_ = 0;
    for (Lane& lane : lanes_) lane.state = Lane::idle;
}

bool McuSource::next(int16_t (*const* blocks)[kBlock]) {
    if (left_ == 0) {
        if (unit_ == scan_->units.size()) return false;
        const Unit& unit = scan_->units[unit_];
        if (unit.first) std::fill_n(last_dc_, 4, 0);
        if (!(scan_->independent ? read_ahead(unit_) : read_alone(unit_))) return false;
        at_ = slot(unit_);
        if (scan_->independent) pass_over(unit.skipped);
        left_ = unit.wanted;
        ++unit_;
    }
    kernels_->move(*plan_, at_, blocks, last_dc_);
    at_ += plan_->blocks * kBlock;
    --left_;
    return true;
}

void McuSource::pass_over(int mcus) {
    for (; mcus > 0; --mcus)
        for (int block = 0; block < plan_->blocks; ++block, at_ += kBlock) {
            last_dc_[plan_->block[block].component] += uint32_t(int32_t(at_[0]));
            std::memset(at_, 0, kBlock * sizeof(int16_t));
        }
}

// Segments before a marker end with less than a byte of padding.
bool McuSource::is_over(const Lane& lane, const Unit& unit) const { return !unit.closes || lane.left() < 8; }

bool McuSource::read_alone(size_t number) {
    const Unit& unit = scan_->units[number];
    Lane& lane = lanes_[0];
    const auto [begin, end] = scan_->segments[unit.segment];
    if (unit.first) lane.start(*plan_, scan_->bytes.data() + begin, scan_->bytes.data() + end);
    if (unit.skipped > 0 && !kernels_->skip(lane, unit.skipped * plan_->blocks, last_dc_)) return false;
    kernels_->aim(lane, unit.wanted * plan_->blocks, slot(number));
    if (lane.state == Lane::reading) kernels_->one(lane);
    return lane.state == Lane::done && is_over(lane, unit);
}

bool McuSource::start_next(Lane& lane, size_t limit) {
    if (begun_ == limit) return true;
    const Unit& unit = scan_->units[begun_];
    const auto [begin, end] = scan_->segments[unit.segment];
    lane.start(*plan_, scan_->bytes.data() + begin, scan_->bytes.data() + end);
    kernels_->aim(lane, (unit.skipped + unit.wanted) * plan_->blocks, slot(begun_));
    unit_of_[&lane - lanes_] = begun_++;
    return lane.state == Lane::reading;
}

// Until `number` is there; the lanes are kept busy with those that come after it.
bool McuSource::read_ahead(size_t number) {
    const size_t limit = std::min(scan_->units.size(), number + slots_);
    const auto is_read = [&](int lane) { return lanes_[lane].state == Lane::reading; };
    const auto waits_for = [&](int lane) { return is_read(lane) && unit_of_[lane] == number; };
    while (begun_ <= number || waits_for(0) || waits_for(1)) {
        for (Lane& lane : lanes_)
            if (lane.state == Lane::idle && !start_next(lane, limit)) return false;
        if (is_read(0) && is_read(1))
            kernels_->pair(lanes_[0], lanes_[1]);
        else
            kernels_->one(lanes_[is_read(1)]);
        for (int lane = 0; lane < 2; ++lane) {
            if (lanes_[lane].state == Lane::bad) return false;
            if (lanes_[lane].state != Lane::done) continue;
            if (!is_over(lanes_[lane], scan_->units[unit_of_[lane]])) return false;
            lanes_[lane].state = Lane::idle;
        }
    }
    return true;
}

}  // namespace noisynn
