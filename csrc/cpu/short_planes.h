// The short planes traversal: the planes of a group of channels, side by side, are one run, in which every value is a
// column. The problem of the plan has the groups as its channels, so that the parts of planes.h cut it too.
#pragma once
#include "cpu/planes.h"

namespace bnfused::cpu {

// The coefficients of the channels of one group, and of the group's columns. OfChannel is `kKinds` values of A, which
// are the coefficients of one channel.
template <class T, class OfChannel>
class GroupCoefficients {
  using A = Accumulate<T>;

 public:
  static constexpr int kKinds = sizeof(OfChannel) / sizeof(A);

  GroupCoefficients(int64_t group_channels, int64_t inner)
      : group_channels_(group_channels),
        inner_(inner),
        stride_(padded(group_channels * inner)),
        of_channel_(new OfChannel[group_channels]),
        of_column_(scratch<A>(kKinds * stride_)) {}

  OfChannel& operator[](int64_t channel) { return of_channel_[channel]; }

  // Copies kinds [first, end) from the channels to their columns.
  void spread(const Leaves<T>& leaves, int first, int end) {
    const A* of_channel = reinterpret_cast<const A*>(of_channel_.get());
    for (int kind = first; kind < end; ++kind) {
      leaves.spread(of_channel + kind, kKinds, group_channels_, inner_, of_column_.get() + kind * stride_);
    }
  }
  const A* data() const { return of_column_.get(); }
  int64_t stride() const { return stride_; }

 private:
  int64_t group_channels_, inner_, stride_;
  std::unique_ptr<OfChannel[]> of_channel_;
  Scratch<A> of_column_;
};

}  // namespace bnfused::cpu
