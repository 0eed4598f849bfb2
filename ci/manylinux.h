// Included before the host library when wheels are built (ci/wheels): glibc 2.27 and 2.29 gave these three new versions that no
// longer set errno, which the linker takes by default. The first ones, of the same bits, are in every glibc, so that a wheel from a
// machine with a new glibc runs on those with an old one.
#if defined(__x86_64__)
#define FIRST "GLIBC_2.2.5"
#elif defined(__aarch64__)
#define FIRST "GLIBC_2.17"
#else
#error "which version of glibc was this processor's first?"
#endif
__asm__(".symver exp, exp@" FIRST);
__asm__(".symver log, log@" FIRST);
__asm__(".symver logf, logf@" FIRST);
