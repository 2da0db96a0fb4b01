// The MCUs of a scan's window, one after another.
#pragma once

#include "entropy.h"
#include "scan.h"

namespace noisynn {

class McuSource {
  public:
    // Comes before `begin`.
    void make_room(const Scan& scan);

    // Begins anew; plan and scan must stay until the last MCU is taken. plan.skip is needed where units depend on
    // each other.
    void begin(const McuPlan& plan, const Scan& scan);

    // Writes the next MCU to blocks[0 .. plan.blocks), row after row. False where the data are bad or at an end.
    bool next(int16_t (*const* blocks)[kBlock]);

    McuPlan plan_room;
    HuffmanTable dc[4], ac[4];  // of the picture before, until it is known that this one has others
    SkipTable skip[4];

    void let_go_of_much() { coefficients_.let_go_of_much(); }

  private:
    void pass_over(int mcus);
    bool read_alone(size_t unit);
    bool read_ahead(size_t unit);
    bool start_next(Lane& lane, size_t limit);
    bool is_over(const Lane& lane, const Unit& unit) const;
    int16_t* slot(size_t unit) { return reinterpret_cast<int16_t*>(coefficients_.data()) + unit % slots_ * slot_size_; }

    const EntropyKernels* kernels_;
    const McuPlan* plan_;
    const Scan* scan_;
    Buffer coefficients_;       // zeros, but for what was read and not yet taken
    size_t slots_, slot_size_;  // units that there is room for; coefficients of one
    size_t unit_, begun_;       // that will be taken, and begun, next
    int longest_;               // MCUs of a unit
    int left_;                  // MCUs to come of the unit before unit_
    int16_t* at_;               // the next of them
    Lane lanes_[2];
    size_t unit_of_[2];         // that a lane reads
    uint32_t last_dc_[4];       // of each component
};

}  // namespace noisynn
