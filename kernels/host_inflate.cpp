// Host only: the CPU's decoder of raw LZ4 blocks. On a GPU, DALI's inflate does this from the same list of blocks.
#include <cstdint>
#include <cstring>

#include "compressed.h"
#include "parallel.h"

namespace {

constexpr int64_t kWide = 16;

// Copies at least `count` bytes, in steps of 16: both sides must have 15 bytes to spare behind.
void copy_wide(uint8_t *out, const uint8_t *in, int64_t count) {
  for (int64_t i = 0; i < count; i += kWide) memcpy(out + i, in + i, kWide);
}

// out[0, count) repeats the `offset` bytes before it, as if copied byte by byte.
void copy_match(uint8_t *out, int64_t offset, int64_t count, const uint8_t *out_end) {
  if (offset >= kWide && out_end - out >= count + kWide) {
    copy_wide(out, out - offset, count);
  } else if (offset == 1) {
    memset(out, out[-1], (size_t)count);
  } else if (offset >= count) {
    memcpy(out, out - offset, (size_t)count);
  } else {
    // What is there already doubles with every step.
    for (int64_t done = 0; done < count;) {
      const int64_t step = offset + done < count - done ? offset + done : count - done;
      memcpy(out + done, out - offset, (size_t)step);
      done += step;
    }
  }
}

// Continues a length of 15 by the bytes that follow. Returns false where they run out.
bool read_length(const uint8_t *&in, const uint8_t *in_end, int64_t &length) {
  uint8_t more;
  do {
    if (in >= in_end) return false;
    more = *in++;
    length += more;
  } while (more == 255);
  return true;
}

// Decodes one block; false unless it is whole and gives exactly `num_out` bytes.
bool inflate_block(const uint8_t *in, int64_t num_in, uint8_t *const out, int64_t num_out) {
  const uint8_t *const in_end = in + num_in;
  uint8_t *cursor = out;
  uint8_t *const out_end = out + num_out;
  while (in < in_end) {
    const uint8_t token = *in++;
    int64_t count = token >> 4;
    if (count == 15 && !read_length(in, in_end, count)) return false;
    if (count > in_end - in || count > out_end - cursor) return false;
    if (in_end - in >= count + kWide && out_end - cursor >= count + kWide)
      copy_wide(cursor, in, count);
    else
      memcpy(cursor, in, (size_t)count);
    in += count;
    cursor += count;
    if (in == in_end) break;  // the last sequence has literals only
    if (in_end - in < 2) return false;
    const int64_t offset = in[0] | in[1] << 8;
    in += 2;
    count = token & 15;
    if (count == 15 && !read_length(in, in_end, count)) return false;
    count += 4;
    if (offset == 0 || offset > cursor - out || count > out_end - cursor) return false;
    copy_match(cursor, offset, count, out_end);
    cursor += count;
  }
  return cursor == out_end;
}

}  // namespace

// Returns the first block that cannot be decoded, or -1.
extern "C" int64_t gpuparse_inflate(int64_t num_blocks, int32_t num_threads, const uint8_t *data,
                                    const CompressedBlock *blocks, uint8_t *arena) {
  std::atomic<int64_t> bad{num_blocks};
  parallel_for(num_blocks, num_threads, [&](int64_t i) {
    const CompressedBlock &block = blocks[i];
    if (inflate_block(data + block.data_offset, block.num_bytes, arena + block.target, block.decoded_bytes)) return;
    for (int64_t known = bad.load(); i < known && !bad.compare_exchange_weak(known, i);) {
    }
  });
  return bad.load() < num_blocks ? bad.load() : -1;
}
