// Runs launches that come through stdin on the emulated kernels and sends back what their arrays hold then: a program of its
// own, since a sanitizer's runtime wants to be the first thing in a process. tests/emulation.py is the other end.
//
// Every number is 64 bits wide. First the names of the kernels are sent, one a line: their length, then the text. A launch:
//   index of the kernel, blocks, threads, number of arrays, number of arguments
//   array      bytes, address modulo 64, content
//   argument   array and offset in it, or -1 and the 8 bytes of the argument itself
// Its answer is the number of arrays, which says that it ended well, and their content.
#include "host.cpp"

#include <cstdio>
#include <cstdlib>
#include <string>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(start, bytes)
#endif

namespace {

void receive(void* to, std::size_t bytes) {
    if (bytes != 0 && std::fread(to, 1, bytes, stdin) != bytes) std::exit(0);
}

int64_t receive() {
    int64_t number;
    receive(&number, sizeof number);
    return number;
}

// An array alone in memory, so that AddressSanitizer sees an index one too far, at an address no better aligned than the
// original's.
struct Array {
    std::size_t bytes, offset;
    char* memory;

    char* start() const { return memory + offset; }
};

}  // namespace

int main() {
    std::string names;
    for (int64_t i = 0; i < kernel_count(); ++i) names += std::string(kernel_name(i)) + "\n";
    const int64_t length = (int64_t)names.size();
    std::fwrite(&length, sizeof length, 1, stdout);
    std::fwrite(names.data(), 1, names.size(), stdout);
    std::fflush(stdout);
    for (;;) {
        const int64_t kernel = receive(), blocks = receive(), threads = receive();
        std::vector<Array> arrays((std::size_t)receive());
        // Exactly as long as it is, so that a kernel with more parameters than arguments is seen.
        const std::size_t count = (std::size_t)receive();
        int64_t* const arguments = (int64_t*)std::malloc(count * sizeof(int64_t));
        for (Array& array : arrays) {
            array.bytes = (std::size_t)receive();
            array.offset = (std::size_t)receive();
            void* memory = nullptr;
            if (posix_memalign(&memory, 64, array.offset + array.bytes) != 0) std::exit(1);
            array.memory = (char*)memory;
            ASAN_POISON_MEMORY_REGION(array.memory, array.offset);
            receive(array.start(), array.bytes);
        }
        for (std::size_t i = 0; i < count; ++i) {
            const int64_t array = receive(), value = receive();
            arguments[i] = array < 0 ? value : (int64_t)(intptr_t)(arrays[(std::size_t)array].start() + value);
        }
        run_emulated(kernel, blocks, threads, arguments);
        const int64_t done = (int64_t)arrays.size();
        std::fwrite(&done, sizeof done, 1, stdout);
        for (const Array& array : arrays) {
            if (array.bytes != 0) std::fwrite(array.start(), 1, array.bytes, stdout);
            std::free(array.memory);
        }
        std::free(arguments);
        std::fflush(stdout);
    }
}
