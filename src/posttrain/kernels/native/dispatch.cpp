/* Which instruction set runs, decided by the processor at run time. */
#include "dispatch.h"

#include <string.h>
#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

#include <mutex>
#include <string>

#include "threads.h"

namespace {

/* With what the files of AVX2 and better are compiled for besides. */
bool has_avx2() {
#if defined(__x86_64__)
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_F16C)) return false; /* gcc knows the name from 11 on */
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return false;
#endif
}

bool has_avxvnni() {
#if defined(__x86_64__)
  unsigned a, b, c, d;
  return has_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && a & 1u << 4;
#else
  return false;
#endif
}

bool has_avx512() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni") && has_avx2();
#else
  return false;
#endif
}

/* AMX tiles have to be asked for: Linux saves their state only for processes that did. */
bool has_amx() {
#if defined(__x86_64__) && defined(__linux__)
  static const bool granted = [] {
    unsigned a, b, c, d;
    if (!has_avx512() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    const unsigned tile = 1u << 24, int8 = 1u << 25; /* of EDX */
    if (!(d & tile) || !(d & int8)) return false;
    const long request = 0x1023 /* ARCH_REQ_XCOMP_PERM */, tile_data = 18;
    return syscall(SYS_arch_prctl, request, tile_data) == 0;
  }();
  return granted;
#else
  return false;
#endif
}

bool has_neon_dotprod() {
#if defined(__aarch64__) && defined(__linux__)
  return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#elif defined(__aarch64__) && defined(__APPLE__)
  return true; /* every Apple processor that runs macOS */
#else
  return false;
#endif
}

/* Intel's cores with AMX bring in two streams faster than one: 8-bit codes by a tenth from memory, by a third
 * from the second cache. Asked for so early, codes that lie in a large third cache come up to a fifth faster
 * than asked for later, and those in memory no slower. AMD's bring in a single stream fastest, asked for
 * early: on Zen 5 with 4-bit codes a quarter faster than two. Zen 4 brings most lines by itself, up to a
 * third faster if they are not asked for; with AVX2, which takes longer for each of them, it does not, and
 * products of few registers ask for every line whatever this says. */
const Reading two_streams = {2, 3456, true}, one_stream = {1, 6144, true}, sparse_stream = {1, 6144, false};

Reading suitable_reading() {
#if defined(__x86_64__)
  unsigned a, b, c, d;
  const unsigned authentic_amd = 0x68747541; /* "Auth", the first letters of the vendor's name */
  if (__get_cpuid(0, &a, &b, &c, &d) && b == authentic_amd && __get_cpuid(1, &a, &b, &c, &d)) {
    const unsigned family = (a >> 8 & 0xf) + (a >> 20 & 0xff), zen5 = 0x1a;
    return family < zen5 ? sparse_stream : one_stream;
  }
#endif
  return two_streams;
}

Reading chosen = suitable_reading();

struct Choice {
  const Kernels *(*kernels)();
  bool (*present)();
};

bool always() { return true; }

/* Best first. A file gives NULL where the library was built for another architecture, or by a compiler that
 * does not know its instructions; it is asked only where the processor has them. */
const Choice choices[] = {
    {amx_kernels, has_amx},
    {avx512_kernels, has_avx512},
    {avxvnni_kernels, has_avxvnni},
    {avx2_kernels, has_avx2},
    {neon_kernels, has_neon_dotprod},
    {portable_kernels, always},
};

const Kernels *kernels_of(const Choice &choice) { return choice.present() ? choice.kernels() : nullptr; }

const Kernels *find(const char *name) {
  for (auto &choice : choices) {
    const Kernels *kernels = kernels_of(choice);
    if (kernels && (!*name || !strcmp(name, kernels->name))) return kernels;
  }
  return nullptr;
}

const Kernels *active = nullptr;

}  // namespace

const Reading &reading() { return chosen; }

const Kernels &active_kernels() {
  if (!active) active = find("");
  return *active;
}

int32_t pt_abi(void) { return PT_ABI; }

#ifndef PT_SOURCES
#define PT_SOURCES ""
#endif
const char *pt_sources(void) { return PT_SOURCES; }

const char *pt_isa(void) {
  std::lock_guard<std::mutex> guard(engine_lock());
  return active_kernels().name;
}

int32_t pt_digits_are_fast(void) {
  std::lock_guard<std::mutex> guard(engine_lock());
  return active_kernels().digits_are_fast;
}

int32_t pt_use(const char *isa) {
  std::lock_guard<std::mutex> guard(engine_lock());
  const Kernels *found = find(isa);
  if (found) active = found;
  return found != nullptr;
}

const char *pt_isas(void) {
  static const std::string names = [] {
    std::string found;
    for (auto &choice : choices) {
      const Kernels *kernels = kernels_of(choice);
      if (kernels) found += (found.empty() ? "" : ",") + std::string(kernels->name);
    }
    return found;
  }();
  return names.c_str();
}

void pt_set_threads(int32_t threads) {
  std::lock_guard<std::mutex> guard(engine_lock());
  set_thread_count(threads);
}

void pt_set_reading(int32_t reading) {
  std::lock_guard<std::mutex> guard(engine_lock());
  switch (reading) {
    case 1: chosen = two_streams; break;
    case 2: chosen = one_stream; break;
    case 3: chosen = sparse_stream; break;
    default: chosen = suitable_reading();
  }
}

int32_t pt_threads(void) {
  std::lock_guard<std::mutex> guard(engine_lock());
  return thread_count();
}
