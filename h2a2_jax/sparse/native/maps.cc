// Kernel maps on the host: the search of neighbours, and pairs cut into tiles. The functions of `native_maps.py` call
// these; each computes what its counterpart in numpy computes, bit for bit.

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

namespace {

// Calls work(part) for each part; threads take parts in turn.
template <class Work>
void for_each_part(int threads, int parts, const Work& work) {
  threads = std::min(threads, parts);
  auto share = [&](int first) {
    for (int part = first; part < parts; part += threads) work(part);
  };
  std::vector<std::thread> others;
  for (int t = 1; t < threads; ++t) others.emplace_back(share, t);
  share(0);
  for (auto& other : others) other.join();
}

// Finds the neighbours of a run: slices whose offsets differ along the last axis alone, in ascending order. Their sites
// are adjacent among the sorted keys: one position, which only advances, serves all centres.
template <bool kMirrored>
void search_run(const int64_t* keys, const int64_t* centres, int64_t m, const int64_t* moves, const int32_t* slices,
                int count, int volume, int32_t* rows) {
  int64_t position = 0;
  for (int64_t o = 0; o < m; ++o) {
    const int64_t centre = centres[o];
    while (keys[position] < centre + moves[0]) ++position;
    int64_t near = position;
    for (int j = 0; j < count; ++j) {
      const int64_t wanted = centre + moves[j];
      near += keys[near] < wanted;         // no branch: half of the slices are hits, in no order
      while (keys[near] < wanted) ++near;  // where dilation passes over sites
      const bool hit = keys[near] == wanted;
      rows[slices[j] * m + o] = hit ? static_cast<int32_t>(near) : -1;
      if (kMirrored) {
        int32_t none;
        int32_t* mirror = rows + (volume - 1 - slices[j]) * m + near;
        *(hit ? mirror : &none) = static_cast<int32_t>(o);
      }
    }
  }
}

// Writes the pairs (row, o) of the outputs first .. last that have a row; returns their number.
int64_t write_pairs(const int32_t* rows, int64_t first, int64_t last, int32_t* in_rows, int32_t* out_rows) {
  constexpr int kBlock = 256;
  int32_t in_block[kBlock + 1], out_block[kBlock + 1];
  int64_t written = 0;
  for (int64_t start = first; start < last; start += kBlock) {
    int count = 0;
    for (int64_t o = start; o < std::min(last, start + kBlock); ++o) {
      in_block[count] = rows[o];
      out_block[count] = static_cast<int32_t>(o);
      count += rows[o] >= 0;
    }
    std::copy_n(in_block, count, in_rows + written);
    std::copy_n(out_block, count, out_rows + written);
    written += count;
  }
  return written;
}

// Fills the places from `used` on of a list of `tiles` tiles with distinct indices past the last row.
void fill_places(int32_t* list, int64_t used, int64_t tiles, int64_t tile, int64_t capacity) {
  for (int64_t t = used / tile; t < tiles; ++t) {
    for (int64_t place = std::max<int64_t>(0, used - t * tile); place < tile; ++place) {
      list[t * tile + place] = static_cast<int32_t>(capacity + place);
    }
  }
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// Row of the key centres[o] + moves[i] at rows[slices[i] * m + o], -1 where there is none.
//
// keys: sorted, with one more at the end that lies above all that are searched. centres: [m], sorted. moves, slices:
// in the order of the runs, ascending within one. ends: [runs], end of each run in them. rows: [volume, m]. mirrored:
// the centres are the keys, and the runs hold one slice of each pair of opposite ones, without the centre.
void h2a2_search(const int64_t* keys, const int64_t* centres, int64_t m, const int64_t* moves, const int32_t* slices,
                 const int32_t* ends, int runs, int volume, int mirrored, int threads, int32_t* rows) {
  for_each_part(threads, runs, [&](int run) {
    const int first = run ? ends[run - 1] : 0;
    const int count = ends[run] - first;
    for (int i = first; mirrored && i < ends[run]; ++i) std::fill_n(rows + (volume - 1 - slices[i]) * m, m, -1);
    (mirrored ? search_run<true> : search_run<false>)(keys, centres, m, moves + first, slices + first, count, volume,
                                                      rows);
  });
  for (int64_t o = 0; mirrored && o < m; ++o) rows[volume / 2 * m + o] = static_cast<int32_t>(o);
}

// Rows [volume, n] padded to [volume, out_capacity], with in_capacity for those that are missing.
void h2a2_pad(const int32_t* rows, int volume, int64_t n, int64_t in_capacity, int64_t out_capacity, int threads,
              int32_t* neighbors) {
  for_each_part(threads, volume, [&](int k) {
    const int32_t missing = static_cast<int32_t>(in_capacity);
    const int32_t* row = rows + k * n;
    int32_t* padded = neighbors + k * out_capacity;
    for (int64_t o = 0; o < n; ++o) padded[o] = row[o] < 0 ? missing : row[o];
    std::fill(padded + n, padded + out_capacity, missing);
  });
}

// Pairs of the first `offsets` offsets in tiles, each of one offset and one scan; returns the number of tiles in use.
//
// rows: [>= offsets, n]. bounds: [scans + 1], first row of each scan among the outputs. mirrored: the lists go on with
// the rows of the centre, whose tiles hold rows of the scan in both lists. in_rows, out_rows: [capacity, tile].
// offset, scan: [capacity].
int64_t h2a2_cut(const int32_t* rows, int offsets, int64_t n, const int64_t* bounds, int scans, int mirrored,
                 int64_t in_capacity, int64_t out_capacity, int64_t tile, int64_t capacity, int threads,
                 int32_t* in_rows, int32_t* out_rows, int32_t* offset, int32_t* scan) {
  const int parts = offsets * scans;
  std::vector<int64_t> starts(parts + 1, 0);  // first tile of each (offset, scan)
  for_each_part(threads, offsets, [&](int k) {
    for (int b = 0; b < scans; ++b) {
      int64_t pairs = 0;
      for (int64_t o = bounds[b]; o < bounds[b + 1]; ++o) pairs += rows[k * n + o] >= 0;
      starts[k * scans + b + 1] = (pairs + tile - 1) / tile;
    }
  });
  for (int part = 0; part < parts; ++part) starts[part + 1] += starts[part];
  for_each_part(threads, parts, [&](int part) {
    const int k = part / scans, b = part % scans;
    const int64_t first = starts[part], tiles = starts[part + 1] - first;
    int32_t *ins = in_rows + first * tile, *outs = out_rows + first * tile;
    const int64_t pairs = write_pairs(rows + k * n, bounds[b], bounds[b + 1], ins, outs);
    fill_places(ins, pairs, tiles, tile, in_capacity);
    fill_places(outs, pairs, tiles, tile, out_capacity);
    std::fill_n(offset + first, tiles, k);
    std::fill_n(scan + first, tiles, b);
  });
  int64_t count = starts[parts];
  for (int b = 0; mirrored && b < scans; ++b) {
    for (int64_t first = bounds[b]; first < bounds[b + 1]; first += 2 * tile, ++count) {
      const int64_t there = std::min(bounds[b + 1], first + tile), back = std::min(bounds[b + 1], first + 2 * tile);
      int32_t *ins = in_rows + count * tile, *outs = out_rows + count * tile;
      for (int64_t o = first; o < there; ++o) ins[o - first] = static_cast<int32_t>(o);
      for (int64_t o = first + tile; o < back; ++o) outs[o - first - tile] = static_cast<int32_t>(o);
      fill_places(ins, there - first, 1, tile, in_capacity);
      fill_places(outs, std::max<int64_t>(0, back - first - tile), 1, tile, out_capacity);
      offset[count] = offsets;
      scan[count] = b;
    }
  }
  const int rest = static_cast<int>(capacity - count);
  for_each_part(threads, rest, [&](int t) {
    fill_places(in_rows + (count + t) * tile, 0, 1, tile, in_capacity);
    fill_places(out_rows + (count + t) * tile, 0, 1, tile, out_capacity);
    offset[count + t] = scan[count + t] = 0;
  });
  return count;
}
}
#pragma GCC visibility pop
