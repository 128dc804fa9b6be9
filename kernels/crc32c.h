// Host only: CRC-32C (RFC 3720), by the processor's instruction where it has one.
#ifndef GPUPARSE_CRC32C_H
#define GPUPARSE_CRC32C_H

#include <cstdint>
#include <cstring>

#if defined(__GNUC__) && defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace {

template <typename T>
T load(const uint8_t *address) {
  T value;
  memcpy(&value, address, sizeof(T));
  return value;
}

struct Crc32cTable {
  uint32_t entries[8][256];
  Crc32cTable() {
    for (uint32_t i = 0; i < 256; ++i) {
      uint32_t crc = i;
      for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ (crc & 1 ? 0x82f63b78u : 0u);
      entries[0][i] = crc;
    }
    for (uint32_t i = 0; i < 256; ++i)
      for (int k = 1; k < 8; ++k) entries[k][i] = entries[k - 1][i] >> 8 ^ entries[0][entries[k - 1][i] & 255];
  }

  static const Crc32cTable &get() {
    static const Crc32cTable table;
    return table;
  }
};

uint32_t crc32c_by_table(const uint8_t *data, int64_t num_bytes) {
  const Crc32cTable &table = Crc32cTable::get();
  uint32_t crc = 0xffffffffu;
  int64_t i = 0;
  for (; i + 8 <= num_bytes; i += 8) {
    const uint32_t low = load<uint32_t>(data + i) ^ crc;
    const uint32_t high = load<uint32_t>(data + i + 4);
    crc = table.entries[7][low & 255] ^ table.entries[6][low >> 8 & 255] ^ table.entries[5][low >> 16 & 255] ^
          table.entries[4][low >> 24] ^ table.entries[3][high & 255] ^ table.entries[2][high >> 8 & 255] ^
          table.entries[1][high >> 16 & 255] ^ table.entries[0][high >> 24];
  }
  for (; i < num_bytes; ++i) crc = crc >> 8 ^ table.entries[0][(crc ^ data[i]) & 255];
  return ~crc;
}

#if defined(__GNUC__) && defined(__x86_64__)
#define GP_CRC32C __attribute__((target("sse4.2")))
GP_CRC32C inline uint64_t crc32c_step(uint64_t state, uint64_t word) { return __builtin_ia32_crc32di(state, word); }
GP_CRC32C inline uint64_t crc32c_step(uint64_t state, uint8_t byte) { return __builtin_ia32_crc32qi(state, byte); }
bool has_crc32c() { return __builtin_cpu_supports("sse4.2"); }
#elif defined(__GNUC__) && defined(__aarch64__)
#define GP_CRC32C  // the assembler is told: what compilers call this instruction differs
GP_CRC32C inline uint64_t crc32c_step(uint64_t state, uint64_t word) {
  uint32_t next;
  asm(".arch_extension crc\n\tcrc32cx %w0, %w1, %x2" : "=r"(next) : "r"((uint32_t)state), "r"(word));
  return next;
}
GP_CRC32C inline uint64_t crc32c_step(uint64_t state, uint8_t byte) {
  uint32_t next;
  asm(".arch_extension crc\n\tcrc32cb %w0, %w1, %w2" : "=r"(next) : "r"((uint32_t)state), "r"((uint32_t)byte));
  return next;
}
bool has_crc32c() { return getauxval(AT_HWCAP) & HWCAP_CRC32; }
#endif

#ifdef GP_CRC32C
// The state after some zero bytes more. It is linear in the state before, so that of each byte of it can be looked up.
class ZeroBytes {
 public:
  explicit ZeroBytes(int64_t num_bytes) {
    const Crc32cTable &table = Crc32cTable::get();
    for (int bit = 0; bit < 32; ++bit) {
      uint32_t state = 1u << bit;
      for (int64_t i = 0; i < num_bytes; ++i) state = state >> 8 ^ table.entries[0][state & 255];
      const uint32_t low = 1u << bit % 8;
      for (uint32_t i = 0; i < low; ++i) entries_[bit / 8][low + i] = entries_[bit / 8][i] ^ state;
    }
  }

  uint32_t after(uint32_t state) const {
    return entries_[0][state & 255] ^ entries_[1][state >> 8 & 255] ^ entries_[2][state >> 16 & 255] ^
           entries_[3][state >> 24];
  }

 private:
  uint32_t entries_[4][256] = {};
};

// The instruction takes two or three cycles and one can begin in each: three pieces go side by side, and the states of
// the first two are carried over the bytes of the next. Moves `data` behind what is done.
template <int64_t kPieceBytes>
GP_CRC32C uint64_t crc32c_of_pieces(uint64_t state, const uint8_t *&data, const uint8_t *end) {
  static const ZeroBytes piece(kPieceBytes);
  for (; end - data >= 3 * kPieceBytes; data += 3 * kPieceBytes) {
    uint64_t first = state, second = 0, third = 0;
    for (int64_t i = 0; i < kPieceBytes; i += 8) {
      first = crc32c_step(first, load<uint64_t>(data + i));
      second = crc32c_step(second, load<uint64_t>(data + kPieceBytes + i));
      third = crc32c_step(third, load<uint64_t>(data + 2 * kPieceBytes + i));
    }
    state = piece.after(piece.after((uint32_t)first) ^ (uint32_t)second) ^ third;
  }
  return state;
}

GP_CRC32C uint32_t crc32c_by_instruction(const uint8_t *data, int64_t num_bytes) {
  const uint8_t *end = data + num_bytes;
  uint64_t state = crc32c_of_pieces<2048>(0xffffffffu, data, end);
  state = crc32c_of_pieces<256>(state, data, end);
  for (; end - data >= 8; data += 8) state = crc32c_step(state, load<uint64_t>(data));
  for (; data < end; ++data) state = crc32c_step(state, *data);
  return ~(uint32_t)state;
}
#endif

uint32_t crc32c(const uint8_t *data, int64_t num_bytes) {
#ifdef GP_CRC32C
  static const bool has_instruction = has_crc32c();
  if (has_instruction) return crc32c_by_instruction(data, num_bytes);
#endif
  return crc32c_by_table(data, num_bytes);
}

}  // namespace

#endif  // GPUPARSE_CRC32C_H
