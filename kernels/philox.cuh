// Random bits as a function of a seed and a counter (Philox 4x32-10): the same on every processor, in any order.
#pragma once

struct Philox {
    unsigned int words[4];
    // An index that is not known while compiling would move the words from registers to memory.
    DEVICE unsigned int word(int i) const { return i == 0 ? words[0] : i == 1 ? words[1] : i == 2 ? words[2] : words[3]; }
};

DEVICE Philox philox(unsigned long long seed, unsigned int c0, unsigned int c1, unsigned int c2, unsigned int c3) {
    unsigned int k0 = (unsigned int)seed, k1 = (unsigned int)(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        const unsigned long long p0 = 0xD2511F53ull * c0, p1 = 0xCD9E8D57ull * c2;
        c0 = (unsigned int)(p1 >> 32) ^ c1 ^ k0;
        c1 = (unsigned int)p1;
        c2 = (unsigned int)(p0 >> 32) ^ c3 ^ k1;
        c3 = (unsigned int)p0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
}
