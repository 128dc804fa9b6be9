// Host only: chunks from files, or from memory where they came over a network, into one buffer, as raw LZ4 blocks that
// a decoder takes as they are.
//
// A chunk is a blosc frame and a crc32c. Its blocks are taken out of the frame and laid at multiples of 16 bytes, which
// decoders on a GPU want. A block that blosc stored uncompressed becomes an LZ4 block of literals: every block is LZ4
// then, and no decoder needs a second path. This runs in C because a batch has hundreds of chunks, and a training
// process has one interpreter.
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <memory>

#include <sys/uio.h>
#include <unistd.h>

#include "chunks.h"
#include "compressed.h"
#include "crc32c.h"
#include "parallel.h"

// Mirrored by RESULT_DTYPE in gpuparse/read.py, 16 bytes.
struct ChunkResult {
  int32_t status;
  int32_t from_storage;  // 1: not all of it was in the page cache
  int64_t detail;        // what the status is about: errno, or the number that was found
};

namespace {

enum { kOk = 0, kReadFailed = 1, kCutShort = 2, kChecksum = 3, kDeclaredSize = 4, kFrameSize = 5, kBlocks = 6 };

constexpr int64_t kBlockBytes = 16384;  // the format's blosc block
constexpr int64_t kAlignment = 16;
constexpr int64_t kHeaderBytes = 16;

// Where a thread has a chunk until it is unpacked. A slice of microscopy may take a hundred megabytes, which no thread
// is to keep: it lives as long as the process.
constexpr int64_t kMostKeptBytes = 4 << 20;

struct Room {
  std::unique_ptr<uint8_t[]> bytes;  // not filled with zeros first, as a vector would be
  int64_t num_bytes = 0;

  uint8_t *of(int64_t wanted) {
    if (num_bytes < wanted) {
      bytes.reset();
      bytes.reset(new uint8_t[(size_t)wanted]);
      num_bytes = wanted;
    }
    return bytes.get();
  }
};

int64_t blocks_of(const ChunkRequest &chunk) { return (chunk.decoded_bytes + kBlockBytes - 1) / kBlockBytes; }

int64_t aligned(int64_t num_bytes) { return (num_bytes + kAlignment - 1) / kAlignment * kAlignment; }

// Reads all of [offset, offset + num_bytes), from the page cache alone where that is possible.
ChunkResult read_file(int32_t file, int64_t offset, int64_t num_bytes, uint8_t *out) {
  ChunkResult result = {kOk, 0, 0};
  int64_t done = 0;
#ifdef RWF_NOWAIT
  iovec whole = {out, (size_t)num_bytes};
  const ssize_t cached = preadv2(file, &whole, 1, offset, RWF_NOWAIT);
  if (cached > 0) done = cached;
#endif
  if (done < num_bytes) result.from_storage = 1;
  while (done < num_bytes) {
    const ssize_t count = pread(file, out + done, (size_t)(num_bytes - done), offset + done);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return {kReadFailed, 1, errno};
    if (count == 0) return {kCutShort, 1, done};
    done += count;
  }
  return result;
}

// An LZ4 block that is nothing but the given literals. Returns its length.
int64_t write_literals(const uint8_t *literals, int64_t num_literals, uint8_t *out) {
  uint8_t *cursor = out;
  if (num_literals < 15) {
    *cursor++ = (uint8_t)(num_literals << 4);
  } else {
    *cursor++ = 0xf0;
    int64_t rest = num_literals - 15;
    for (; rest >= 255; rest -= 255) *cursor++ = 255;
    *cursor++ = (uint8_t)rest;
  }
  memcpy(cursor, literals, (size_t)num_literals);
  return cursor - out + num_literals;
}

// Takes the blocks out of a frame whose checksum held. Nothing in it is trusted all the same.
ChunkResult unpack_frame(const ChunkRequest &chunk, const uint8_t *frame, int64_t frame_bytes, uint8_t *data,
                         CompressedBlock *blocks) {
  if (load<uint32_t>(frame + 4) != chunk.decoded_bytes) return {kDeclaredSize, 0, load<uint32_t>(frame + 4)};
  if (load<uint32_t>(frame + 12) != frame_bytes) return {kFrameSize, 0, load<uint32_t>(frame + 12)};
  const uint8_t flags = frame[2];
  const bool stored = flags & 2;
  // Not shuffled, and each block one LZ4 stream: elements of one byte, or blocks that are not split by element.
  const bool plain_lz4 = flags >> 5 == 1 && !(flags & 5) && (frame[3] == 1 || flags & 16);
  const int64_t wanted = chunk.decoded_bytes < kBlockBytes ? chunk.decoded_bytes : kBlockBytes;
  const int64_t num_blocks = blocks_of(chunk);
  const int64_t starts_end = kHeaderBytes + (stored ? 0 : 4 * num_blocks);
  const bool whole = stored ? frame_bytes == kHeaderBytes + chunk.decoded_bytes : load<uint32_t>(frame + 8) == wanted;
  if (!(stored || plain_lz4) || !whole || starts_end > frame_bytes) return {kBlocks, 0, -1};
  int64_t used = 0;
  for (int64_t i = 0; i < num_blocks; ++i) {
    const int64_t left = chunk.decoded_bytes - i * kBlockBytes;
    const int64_t decoded = left < kBlockBytes ? left : kBlockBytes;
    int64_t start = kHeaderBytes + i * kBlockBytes;
    int64_t num_bytes = decoded;
    if (!stored) {
      start = load<uint32_t>(frame + kHeaderBytes + 4 * i);
      if (start < starts_end || start + 4 > frame_bytes) return {kBlocks, 0, i};
      num_bytes = load<uint32_t>(frame + start);
      start += 4;
      if (num_bytes < 1 || num_bytes > decoded || start + num_bytes > frame_bytes) return {kBlocks, 0, i};
    }
    if (used + num_bytes + num_bytes / 255 + 2 > chunk.capacity) return {kBlocks, 0, i};
    uint8_t *out = data + chunk.data_offset + used;
    CompressedBlock &block = blocks[chunk.first_block + i];
    block.data_offset = chunk.data_offset + used;
    block.target = chunk.target + i * kBlockBytes;
    block.decoded_bytes = (int32_t)decoded;
    if (num_bytes == decoded) {
      block.num_bytes = (int32_t)write_literals(frame + start, num_bytes, out);
    } else {
      memcpy(out, frame + start, (size_t)num_bytes);
      block.num_bytes = (int32_t)num_bytes;
    }
    used += aligned(block.num_bytes);
  }
  return {kOk, 0, 0};
}

}  // namespace

// Gives each chunk its entries in the list of blocks and its room in the buffer; writes how many blocks and bytes.
extern "C" void gpuparse_lay_out(int64_t num_chunks, ChunkRequest *chunks, int64_t *totals) {
  int64_t num_blocks = 0, num_bytes = 0;
  for (int64_t i = 0; i < num_chunks; ++i) {
    ChunkRequest &chunk = chunks[i];
    const int64_t count = blocks_of(chunk);
    // A block stored as it is grows by a byte in 255 and two; each starts at an aligned place.
    chunk.capacity = aligned(chunk.num_bytes + chunk.num_bytes / 255 + (2 + kAlignment) * count);
    chunk.first_block = num_blocks;
    chunk.data_offset = num_bytes;
    num_blocks += count;
    num_bytes += chunk.capacity;
  }
  totals[0] = num_blocks, totals[1] = num_bytes;
}

extern "C" void gpuparse_read_chunks(int64_t num_chunks, int32_t num_threads, const ChunkRequest *chunks, uint8_t *data,
                                     CompressedBlock *blocks, ChunkResult *results) {
  parallel_for(num_chunks, num_threads, [&](int64_t i) {
    const ChunkRequest &chunk = chunks[i];
    static thread_local Room kept;
    Room large;
    const uint8_t *bytes = (const uint8_t *)(intptr_t)chunk.file_offset;
    results[i] = {kOk, 1, 0};
    if (!chunk.in_memory) {
      uint8_t *own = (chunk.num_bytes > kMostKeptBytes ? large : kept).of(chunk.num_bytes);
      results[i] = read_file(chunk.file, chunk.file_offset, chunk.num_bytes, own);
      bytes = own;
      if (results[i].status != kOk) return;
    }
    const int64_t frame_bytes = chunk.num_bytes - 4;
    if (crc32c(bytes, frame_bytes) != load<uint32_t>(bytes + frame_bytes)) {
      results[i].status = kChecksum;
      return;
    }
    const ChunkResult unpacked = unpack_frame(chunk, bytes, frame_bytes, data, blocks);
    results[i].status = unpacked.status;
    results[i].detail = unpacked.detail;
  });
}

extern "C" uint32_t gpuparse_crc32c(const uint8_t *data, int64_t num_bytes, int32_t by_table) {
  return by_table ? crc32c_by_table(data, num_bytes) : crc32c(data, num_bytes);
}
