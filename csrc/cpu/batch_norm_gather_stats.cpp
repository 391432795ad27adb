// The moments of a whole batch from those of its parts, by Chan's formula, and the running statistics moved by them.
//
// Threads own channels and take the parts in order, so that the same parts give the same bits wherever that is done.
#include <algorithm>
#include <vector>

#include "cpu/backend.h"
#include "cpu/driver.h"

namespace bnfused::cpu {
namespace {

// sum[c] += value(part, c), of the parts that have values: what others hold may be anything, and 0 * NaN is NaN.
template <class Value>
void add_parts(const GatherArgs& args, int64_t begin, int64_t end, double* sum, const Value& value) {
  for (int64_t part = 0; part < args.parts; ++part) {
    if (!(args.count[part] > 0)) continue;
    for (int64_t c = begin; c < end; ++c) sum[c] += value(part, c);
  }
}

}  // namespace

void batch_norm_gather_stats(const GatherArgs& args) {
  double total = 0;
  for (int64_t part = 0; part < args.parts; ++part) total += args.count[part];
  *args.batch_count = total;
  const int64_t counted = args.num_batches_tracked ? ++*args.num_batches_tracked : 0;
  const double momentum = args.cumulative ? 1 / double(counted) : args.momentum;
  const double per_row = 1 / std::max(total, 1.0), per_free_row = 1 / (total - 1);

  at::parallel_for(0, args.channels, kChannelGrain, [&](int64_t begin, int64_t end) {
    double *mean = args.batch_mean, *m2 = args.batch_var;
    const auto its_mean = [&](int64_t part, int64_t c) { return args.mean[part * args.channels + c]; };
    std::fill(mean + begin, mean + end, 0.0);
    add_parts(args, begin, end, mean,
              [&](int64_t part, int64_t c) { return args.count[part] * per_row * its_mean(part, c); });
    // What rounding left: parts of one mean have it together.
    std::vector<double> rest(end - begin);
    add_parts(args, begin, end, rest.data() - begin,
              [&](int64_t part, int64_t c) { return args.count[part] * per_row * (its_mean(part, c) - mean[c]); });
    for (int64_t c = begin; c < end; ++c) mean[c] += rest[c - begin];

    std::fill(m2 + begin, m2 + end, 0.0);
    add_parts(args, begin, end, m2, [&](int64_t part, int64_t c) {
      const double away = its_mean(part, c) - mean[c];
      return args.m2[part * args.channels + c] + args.count[part] * away * away;
    });
    for (int64_t c = begin; c < end; ++c) {
      if (total > 1) {  // the variance of one value is undefined
        const auto move = [&](const PerChannel& running, double of_batch) {
          write(running, c, (1 - momentum) * read(running, c, 0) + momentum * of_batch);
        };
        move(args.running_mean, mean[c]);
        move(args.running_var, m2[c] * per_free_row);
      }
      m2[c] *= per_row;  // now the variance
    }
  });
}

}  // namespace bnfused::cpu
