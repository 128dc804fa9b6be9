// Host only: chunks of a batch looked up in their shards' indexes. A batch has hundreds of chunks in dozens of files.
#include "chunks.h"

// Some chunks that stand together, all of one shard: five 64-bit words of gpuparse/locate.py.
struct ShardRun {
  const uint64_t *index;  // of the shard: offset and size of each of its chunks; null: there is no such shard
  uint64_t file_bytes;
  int64_t first, end;  // the chunks
  int64_t file;
};

// For each chunk its place in its shard's index is given; its offset, size and file are filled in, and whether it is
// there: 0 never written, 1 there, 2 the index points outside the file. Returns how many of the last kind there are.
extern "C" int64_t gpuparse_look_up(int64_t num_runs, const ShardRun *runs, const int64_t *entries,
                                    ChunkRequest *chunks, uint8_t *found) {
  constexpr uint64_t kMissing = ~uint64_t{0};
  constexpr uint64_t kMinFrameBytes = 20;  // blosc's header and the checksum
  int64_t num_bad = 0;
  for (int64_t r = 0; r < num_runs; ++r) {
    const ShardRun &run = runs[r];
    for (int64_t i = run.first; i < run.end; ++i) {
      chunks[i].file = (int32_t)run.file;
      chunks[i].file_offset = chunks[i].num_bytes = 0;
      found[i] = 0;
      if (!run.index) continue;
      const uint64_t offset = run.index[2 * entries[i]], num_bytes = run.index[2 * entries[i] + 1];
      if (offset == kMissing && num_bytes == kMissing) continue;
      if (num_bytes < kMinFrameBytes || num_bytes > run.file_bytes || offset > run.file_bytes - num_bytes) {
        found[i] = 2;
        ++num_bad;
        continue;
      }
      chunks[i].file_offset = (int64_t)offset;
      chunks[i].num_bytes = (int64_t)num_bytes;
      found[i] = 1;
    }
  }
  return num_bad;
}
