/* A keyed hash for names that come from strangers' files: with the key drawn at random, a file cannot be made
 * whose names all fall into one slot. Only for tables in memory: values differ from run to run. */
#ifndef QL_HASH_H
#define QL_HASH_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/random.h>

/* A key for one table. */
static inline uint64_t ql_hash_key(void)
{
    uint64_t key = 0x9e3779b97f4a7c15u;
    if (getrandom(&key, sizeof key, GRND_NONBLOCK) != (ssize_t)sizeof key) key ^= (uintptr_t)&key;
    return key;
}

static inline uint64_t ql_hash_mix(uint64_t a, uint64_t b)
{
    unsigned __int128 product = (unsigned __int128)a * b;
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

static inline uint64_t ql_hash(uint64_t key, const char *data /* size bytes */, size_t size)
{
    uint64_t factor = (key ^ 0xd6e8feb86659fd93u) | 1, h = key + size, word;
    while (size >= 8) {
        memcpy(&word, data, 8);
        h = ql_hash_mix(h ^ word, factor) + key;
        data += 8, size -= 8;
    }
    word = 0;
    memcpy(&word, data, size);
    return ql_hash_mix(h ^ word, factor) ^ (h >> 32);
}

#endif
