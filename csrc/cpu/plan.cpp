// The plan of a batch: distinct tokens per sample, owners, and the stable partition by owner. The same in torch:
// ta_plugin/ops/planning.py.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <tuple>
#include <vector>

namespace {

using at::Tensor;

Tensor int64s(const Tensor& x, const char* name, int64_t dims) {
  TORCH_CHECK_VALUE(x.scalar_type() == at::kLong && x.dim() == dims, name, " is ", x.sizes(), " ", x.dtype(),
                    "; pass int64 of ", dims, " dimensions");
  return x.contiguous();
}

uint64_t mix(uint64_t x) {
  x ^= x >> 33;
  x *= 0xff51afd7ed558ccdull;  // MurmurHash3's finaliser (Appleby), its first half
  x ^= x >> 33;
  return x * 0xc4ceb9fe1a85ec53ull;
}

// Numbers a sample's tokens by first occurrence: row[i] of each, `first` the position where each row begins; how many rows.
int64_t number_rows(const int64_t* token, int64_t count, int64_t* row, int64_t* first, std::vector<int64_t>& table) {
  int bits = 1;
  while ((int64_t(1) << bits) < 2 * count) ++bits;
  const int64_t slots = int64_t(1) << bits;
  table.assign(slots, -1);
  int64_t rows = 0;
  for (int64_t i = 0; i < count; ++i) {
    int64_t slot = int64_t(mix(uint64_t(token[i])) >> (64 - bits));
    while (table[slot] >= 0 && token[first[table[slot]]] != token[i]) slot = (slot + 1) & (slots - 1);
    if (table[slot] < 0) {
      first[rows] = i;
      table[slot] = rows++;
    }
    row[i] = table[slot];
  }
  return rows;
}

using Nine = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// tokens (B, L) with lengths (B,), or packed tokens (M,) with bounds (B + 1,), which may end before M where `rows` are given. Row
// outputs have room for `rows` (or any number); ta_plugin/ops/planning.py says what lies past the rows there are.
Nine unique(const Tensor& tokens_, const Tensor& extents_, int64_t capacity, bool grouped) {
  const bool padded = tokens_.dim() == 2, fill = capacity >= 0;
  const Tensor tokens = int64s(tokens_, "tokens", padded ? 2 : 1), extents = int64s(extents_, "extents", 1);
  const int64_t samples = padded ? tokens.size(0) : extents.size(0) - 1, slots = tokens.numel();
  TORCH_CHECK_VALUE(samples >= 0 && (!padded || extents.size(0) == samples), "extents has ", extents.size(0),
                    " entries; pass a length per sample of padded tokens, or one bound more than samples for packed ones");
  if (!fill) capacity = slots;
  const auto empty = [&](int64_t n) { return at::empty({n}, tokens.options()); };
  Tensor distinct = empty(capacity), counts = empty(capacity), offsets = empty(grouped ? capacity + 1 : 0), inverse = empty(slots),
         order = empty(grouped ? slots : 0), bounds = at::zeros({samples + 1}, tokens.options()), grid = empty(padded ? slots : 0),
         sizes = empty(5), cu_seqlens = at::zeros({samples + 1}, tokens.options().dtype(at::kInt));
  const int64_t *token = tokens.const_data_ptr<int64_t>(), *extent = extents.const_data_ptr<int64_t>();
  int64_t* bound = bounds.mutable_data_ptr<int64_t>();

  int64_t lowest = samples ? std::numeric_limits<int64_t>::max() : 0, highest = samples ? -lowest : 0;
  for (int64_t b = 0; b < samples; ++b) {
    const int64_t length = padded ? extent[b] : extent[b + 1] - extent[b];
    lowest = std::min(lowest, length), highest = std::max(highest, length);
  }
  bool fine = lowest >= 0 && (padded ? samples == 0 || highest <= tokens.size(1) : extent[0] == 0 && (fill ? extent[samples] <= slots : extent[samples] == slots));
  for (int64_t b = 0; fine && b < samples; ++b) bound[b + 1] = bound[b] + (padded ? extent[b] : extent[b + 1] - extent[b]);
  const int64_t members = bound[samples];

  int64_t *row = inverse.mutable_data_ptr<int64_t>(), *by_row = order.mutable_data_ptr<int64_t>();
  std::vector<int64_t> rows_of(samples + 1, 0), first(members);
  const auto begin_of = [&](int64_t b) { return padded ? b * tokens.size(1) : bound[b]; };
  at::parallel_for(0, samples, 1, [&](int64_t from, int64_t to) {
    std::vector<int64_t> table;
    for (int64_t b = from; b < to; ++b)
      rows_of[b + 1] = number_rows(token + begin_of(b), bound[b + 1] - bound[b], row + bound[b], first.data() + bound[b], table);
  });
  for (int64_t b = 0; b < samples; ++b) rows_of[b + 1] += rows_of[b];
  const int64_t rows = rows_of[samples];
  TORCH_CHECK_VALUE(rows <= std::numeric_limits<int32_t>::max(), "tokens hold ", rows,
                    " distinct rows; cu_seqlens is int32, so split the batch below 2**31");

  int64_t *ids = distinct.mutable_data_ptr<int64_t>(), *count = counts.mutable_data_ptr<int64_t>(),
          *offset = offsets.mutable_data_ptr<int64_t>(), *slot = grid.mutable_data_ptr<int64_t>();
  int32_t* cu = cu_seqlens.mutable_data_ptr<int32_t>();
  at::parallel_for(0, samples, 1, [&](int64_t from, int64_t to) {
    std::vector<int64_t> next;
    for (int64_t b = from; b < to; ++b) {
      const int64_t mine = rows_of[b + 1] - rows_of[b];
      cu[b + 1] = int32_t(rows_of[b + 1]);
      next.assign(mine + 1, 0);
      for (int64_t i = bound[b]; i < bound[b + 1]; ++i) {
        ++next[row[i] + 1];
        if (padded) slot[i] = b * tokens.size(1) + i - bound[b];
      }
      for (int64_t r = 0; r < mine; ++r) {
        const int64_t whole = rows_of[b] + r;
        if (whole < capacity) {
          ids[whole] = token[begin_of(b) + first[bound[b] + r]];
          count[whole] = next[r + 1];
          if (grouped) offset[whole] = bound[b] + next[r];
        }
        next[r + 1] += next[r];
      }
      for (int64_t i = bound[b]; i < bound[b + 1]; ++i) {
        if (grouped) by_row[bound[b] + next[row[i]]++] = i;
        row[i] += rows_of[b];
      }
    }
  });
  if (grouped && rows <= capacity) offset[rows] = members;
  if (fill) {
    const bool fits = rows <= capacity;
    const int64_t from = fits ? rows : 0, occurrences = fits ? members : 0;
    std::fill(row + occurrences, row + slots, 0);
    if (grouped) std::fill(by_row + members, by_row + slots, 0), std::fill(offset + from, offset + capacity + 1, occurrences);
    if (padded) std::fill(slot + members, slot + slots, 0);
    if (fits) std::fill(ids + rows, ids + capacity, rows > 0 ? ids[0] : 0);
    std::fill(count + from, count + capacity, 0);
    if (!fits) std::fill(cu, cu + samples + 1, 0);
  }
  int64_t* size = sizes.mutable_data_ptr<int64_t>();
  size[0] = members, size[1] = rows, size[2] = lowest, size[3] = highest, size[4] = fine;
  return {distinct, cu_seqlens, counts, bounds, inverse, order, offsets, grid, sizes};
}

// Members by segment: index (M,) of each, counts (U,) -> order (M,), ascending within a segment, and offsets (U + 1,). Members behind the
// sum of the counts belong to none.
std::tuple<Tensor, Tensor> group(const Tensor& index_, const Tensor& counts_) {
  const Tensor index = int64s(index_, "index", 1), counts = int64s(counts_, "counts", 1);
  const int64_t segments = counts.numel();
  Tensor order = at::zeros_like(index), offsets = at::zeros({segments + 1}, index.options());
  const int64_t *of = index.const_data_ptr<int64_t>(), *count = counts.const_data_ptr<int64_t>();
  int64_t *member = order.mutable_data_ptr<int64_t>(), *offset = offsets.mutable_data_ptr<int64_t>();
  for (int64_t s = 0; s < segments; ++s) offset[s + 1] = offset[s] + count[s];
  TORCH_CHECK_VALUE(offset[segments] <= index.numel(), "counts add up to ", offset[segments], "; pass those of index, at most ",
                    index.numel());
  std::vector<int64_t> next(offset, offset + segments);
  for (int64_t i = 0; i < offset[segments]; ++i) {
    TORCH_CHECK_INDEX(of[i] >= 0 && of[i] < segments && next[of[i]] < offset[of[i] + 1], "index[", i, "] is ", of[i],
                      ", which counts do not hold so often");
    member[next[of[i]]++] = i;
  }
  return {order, offsets};
}

// The row of an id in the whole table; -1 for an id outside the vocabulary.
int64_t permuted(int64_t id, int64_t vocab, int64_t multiplier) {
  return id >= 0 && id < vocab ? id * multiplier % vocab : -1;
}

Tensor owners(const Tensor& ids_, int64_t ranks, int64_t vocab, int64_t multiplier) {
  TORCH_CHECK_VALUE(ranks >= 1 && vocab >= 0, "ranks is ", ranks, " and vocab ", vocab, "; pass ranks >= 1, vocab >= 0");
  const Tensor ids = int64s(ids_, "ids", ids_.dim());
  Tensor out = at::empty_like(ids);
  const int64_t* id = ids.const_data_ptr<int64_t>();
  int64_t* owner = out.mutable_data_ptr<int64_t>();
  const int64_t rows_per_rank = (vocab + ranks - 1) / ranks;
  at::parallel_for(0, ids.numel(), at::internal::GRAIN_SIZE, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) {
      if (vocab > 0) {
        const int64_t row = permuted(id[i], vocab, multiplier);
        owner[i] = row < 0 ? -1 : row / rows_per_rank;
        continue;
      }
      uint64_t x = uint64_t(id[i]);  // splitmix64's finaliser (Steele, Lea, Flood 2014)
      x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
      x = (x ^ x >> 27) * 0x94d049bb133111ebull;
      owner[i] = int64_t((x ^ x >> 31) >> 1) % ranks;
    }
  });
  return out;
}

Tensor local_rows(const Tensor& ids_, int64_t first, int64_t held, int64_t vocab, int64_t multiplier, int64_t other) {
  TORCH_CHECK_VALUE(vocab >= 1, "vocab is ", vocab, "; pass 1 or more");
  const Tensor ids = int64s(ids_, "ids", ids_.dim());
  Tensor out = at::empty_like(ids);
  const int64_t* id = ids.const_data_ptr<int64_t>();
  int64_t* local = out.mutable_data_ptr<int64_t>();
  at::parallel_for(0, ids.numel(), at::internal::GRAIN_SIZE, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) {
      const int64_t row = permuted(id[i], vocab, multiplier);
      local[i] = row >= first && row - first < held ? row - first : other;
    }
  });
  return out;
}

std::tuple<Tensor, Tensor> partition(const Tensor& owner_, const Tensor& bounds_, int64_t ranks) {
  const Tensor owner = int64s(owner_, "owner", 1), bounds = int64s(bounds_, "bounds", 1);
  TORCH_CHECK_VALUE(ranks >= 1 && bounds.size(0) >= 1, "ranks is ", ranks, " and bounds has ", bounds.size(0),
                    " entries; pass ranks >= 1 and samples + 1 bounds");
  const int64_t n = owner.numel(), samples = bounds.size(0) - 1;
  const int64_t *to = owner.const_data_ptr<int64_t>(), *bound = bounds.const_data_ptr<int64_t>();
  TORCH_CHECK_VALUE(bound[0] == 0 && bound[samples] == n && std::is_sorted(bound, bound + samples + 1),
                    "bounds run from ", bound[0], " to ", bound[samples], "; they must rise from 0 to ", n);
  Tensor order = at::empty_like(owner), sizes = at::zeros({ranks, samples}, owner.options());
  int64_t* size = sizes.mutable_data_ptr<int64_t>();
  // items without an owner come last, as those of one more rank; all sizes of their sample are -1
  const auto bucket = [&](int64_t i) { return to[i] >= 0 && to[i] < ranks ? to[i] : ranks; };
  std::vector<int64_t> next(ranks + 2, 0);
  for (int64_t b = 0; b < samples; ++b) {
    bool owned = true;
    for (int64_t i = bound[b]; i < bound[b + 1]; ++i) {
      const int64_t r = bucket(i);
      ++next[r + 1];
      if (r < ranks)
        ++size[r * samples + b];
      else
        owned = false;
    }
    for (int64_t r = 0; r < ranks && !owned; ++r) size[r * samples + b] = -1;
  }
  for (int64_t r = 0; r <= ranks; ++r) next[r + 1] += next[r];
  int64_t* item = order.mutable_data_ptr<int64_t>();
  for (int64_t i = 0; i < n; ++i) item[next[bucket(i)]++] = i;
  return {order, sizes};
}

}  // namespace

TORCH_LIBRARY_IMPL(ta_plugin, CPU, m) {
  m.impl("unique", unique);
  m.impl("group", group);
  m.impl("owners", owners);
  m.impl("local_rows", local_rows);
  m.impl("partition", partition);
}
