// Host only: the planes of a batch of slices and the chunks under them, each once. A batch has a hundred planes that
// are cut into a thousand tiles, from dozens of cases; in numpy that held the interpreter for most of the time of
// reading.
#include <algorithm>
#include <unordered_map>
#include <utility>
#include <vector>

#include "planes.h"

// All planes of one array along one axis. Mirrored by LANE_DTYPE in gpuparse/gather.py, 136 bytes.
struct Lane {
  Plane plane;                    // its first block and tables left open
  int64_t array;                  // the array's number in its store
  int64_t depth;                  // planes in a layer of chunks
  int64_t layer_step;             // from a chunk's number to that of the next layer
  int64_t row_step, column_step;  // and of the next tile, down and to the right
  int64_t plane_step;             // bytes between planes inside a chunk
  int32_t grid_rows, grid_columns;
};

// One axis of a case. Mirrored by VIEW_DTYPE in gpuparse/gather.py, 280 bytes.
struct View {
  int64_t num_slices;
  Lane image, labels;
};

static_assert(sizeof(Plane) == 80 && sizeof(Lane) == 136 && sizeof(View) == 280, "mirrored in gpuparse/gather.py");

// How much there is to be written, and was.
struct GatherCounts {
  int64_t num_tiles, num_chunks, num_arrays, num_lengths;
};

namespace {

constexpr int kNumberBits = 40;  // of a chunk's number in its array, below the array's own number

int64_t tiles_of(const Lane &lane) { return (int64_t)lane.grid_rows * lane.grid_columns; }

class Gatherer {
 public:
  Gatherer(int32_t out_height, int32_t out_width, int64_t num_tiles, int32_t *lengths)
      : out_height_(out_height), out_width_(out_width), lengths_(lengths) {
    tiles_.reserve((size_t)num_tiles);
  }

  // Adds a plane, and its tiles behind those that there are.
  void add(const Lane &lane, int64_t first_array, int64_t position, Plane *plane, int64_t *tile_offset) {
    *plane = lane.plane;
    plane->first_block = (int64_t)tiles_.size();
    plane->row_table = table(lane.plane.padded_height, out_height_);
    plane->column_table = table(lane.plane.padded_width, out_width_);
    const int64_t layer = position / lane.depth;
    const int64_t offset = (position - layer * lane.depth) * lane.plane_step;
    const uint64_t array = (uint64_t)(first_array + lane.array) << kNumberBits;
    for (int32_t row = 0; row < lane.grid_rows; ++row)
      for (int32_t column = 0; column < lane.grid_columns; ++column) {
        const int64_t number = layer * lane.layer_step + row * lane.row_step + column * lane.column_step;
        tile_offset[tiles_.size()] = offset;
        tiles_.emplace_back(array | (uint64_t)number, (int64_t)tiles_.size());
      }
  }

  // Numbers the chunks in the order of their arrays and in these of the chunks.
  void number_chunks(int64_t *tile_chunk, int64_t *chunk_array, int64_t *chunk_number, int64_t *arrays,
                     GatherCounts *counts) {
    std::sort(tiles_.begin(), tiles_.end());
    int64_t num_chunks = 0, num_arrays = 0;
    uint64_t last = 0;
    for (const auto &[key, tile] : tiles_) {
      if (num_chunks == 0 || key != last) {
        const int64_t array = (int64_t)(key >> kNumberBits);
        if (num_arrays == 0 || arrays[num_arrays - 1] != array) arrays[num_arrays++] = array;
        chunk_array[num_chunks] = num_arrays - 1;
        chunk_number[num_chunks++] = (int64_t)(key & ((uint64_t{1} << kNumberBits) - 1));
        last = key;
      }
      tile_chunk[tile] = num_chunks - 1;
    }
    *counts = {(int64_t)tiles_.size(), num_chunks, num_arrays, (int64_t)tables_.size()};
  }

 private:
  // The number of the table that resamples one length to another.
  int32_t table(int32_t source, int32_t target) {
    const auto found = tables_.emplace((uint64_t)(uint32_t)source << 32 | (uint32_t)target, (int32_t)tables_.size());
    const int32_t number = found.first->second;
    if (found.second) lengths_[2 * number] = source, lengths_[2 * number + 1] = target;
    return number;
  }

  int32_t out_height_, out_width_;
  int32_t *lengths_;
  std::vector<std::pair<uint64_t, int64_t>> tiles_;
  std::unordered_map<uint64_t, int32_t> tables_;
};

}  // namespace

// The slice itself, the one before, the one after, reflected at the ends: channel_positions of gpuparse/views.py.
static void channel_positions(int64_t position, int64_t num_slices, int64_t (&channels)[3]) {
  const int64_t last = num_slices - 1;
  channels[0] = position;
  channels[1] = position > 0 ? position - 1 : std::min<int64_t>(1, last);
  channels[2] = position < last ? position + 1 : std::max<int64_t>(last - 1, 0);
}

// Counts the tiles of a batch. Returns the first slice that is outside its case, -1 where there is none.
extern "C" int64_t gpuparse_count_tiles(int64_t num_slices, const View *const *views, const int64_t *positions,
                                        int32_t with_images, GatherCounts *counts) {
  *counts = {0, 0, 0, 0};
  for (int64_t i = 0; i < num_slices; ++i) {
    if (positions[i] < 0 || positions[i] >= views[i]->num_slices) return i;
    counts->num_tiles += tiles_of(views[i]->labels) + (with_images ? 3 * tiles_of(views[i]->image) : 0);
  }
  return -1;
}

// For each slice its view, its place along the view's axis, and how many arrays stand before those of its store. Writes
// planes (three of the image for each slice, then one of the labels each), for each tile its chunk and its offset, the
// chunks, the arrays that these are of, and (source, target) lengths of resampling tables.
extern "C" void gpuparse_gather(int64_t num_slices, const View *const *views, const int64_t *positions,
                                const int64_t *first_arrays, int32_t with_images, int32_t out_height, int32_t out_width,
                                Plane *planes, int64_t *tile_chunk, int64_t *tile_offset, int64_t *chunk_array,
                                int64_t *chunk_number, int64_t *arrays, int32_t *lengths, GatherCounts *counts) {
  Gatherer gatherer(out_height, out_width, counts->num_tiles, lengths);
  for (int64_t i = 0; with_images && i < num_slices; ++i) {
    int64_t channels[3];
    channel_positions(positions[i], views[i]->num_slices, channels);
    for (const int64_t position : channels)
      gatherer.add(views[i]->image, first_arrays[i], position, planes++, tile_offset);
  }
  for (int64_t i = 0; i < num_slices; ++i)
    gatherer.add(views[i]->labels, first_arrays[i], positions[i], planes++, tile_offset);
  gatherer.number_chunks(tile_chunk, chunk_array, chunk_number, arrays, counts);
}
