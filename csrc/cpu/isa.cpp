#include "saerec/isa.h"

#include <atomic>
#include <stdexcept>

#include "kernels.h"

#define SAEREC_TIER scalar
#include "tier.inc"
#undef SAEREC_TIER
#if defined(SAEREC_HAVE_X86_TIERS)
#define SAEREC_TIER avx2
#include "tier.inc"
#undef SAEREC_TIER
#if defined(SAEREC_HAVE_AVX2_VNNI)
#define SAEREC_TIER avx2_vnni
#include "tier.inc"
#undef SAEREC_TIER
#endif
#define SAEREC_TIER avx512
#include "tier.inc"
#undef SAEREC_TIER
#define SAEREC_TIER avx512_vnni
#include "tier.inc"
#undef SAEREC_TIER
#endif

#define SAEREC_TIER_KERNELS(tier)                                                                             \
  {tier::pack_blocks,    tier::encode_topk, tier::encode_threshold, tier::encode_features, tier::score_slots, \
   tier::find_outscored, tier::edit_slots,  tier::add_changes,      tier::decode_rows,     tier::dot_rows,    \
   tier::sum_groups,     tier::pack_panel,  tier::step_rows,        tier::step_groups,     tier::adam_rows}

namespace saerec {

namespace {

struct Tier {
  const char* name;
  bool (*runnable)();
  Kernels kernels;
};

// __builtin_cpu_supports checks CPUID and, through XGETBV, that the system saves the registers.
#if defined(SAEREC_HAVE_X86_TIERS)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
}
#endif

const Tier kTiers[] = {
    {"scalar", [] { return true; }, SAEREC_TIER_KERNELS(scalar)},
#if defined(SAEREC_HAVE_X86_TIERS)
    {"avx2", has_avx2, SAEREC_TIER_KERNELS(avx2)},
#if defined(SAEREC_HAVE_AVX2_VNNI)
    {"avx2_vnni", [] { return has_avx2() && __builtin_cpu_supports("avxvnni"); }, SAEREC_TIER_KERNELS(avx2_vnni)},
#endif
    {"avx512", has_avx512, SAEREC_TIER_KERNELS(avx512)},
    {"avx512_vnni", [] { return has_avx512() && __builtin_cpu_supports("avx512vnni"); },
     SAEREC_TIER_KERNELS(avx512_vnni)},
#endif
};

const Tier* fastest() {
  const Tier* best = kTiers;
  for (const Tier& tier : kTiers) {
    if (tier.runnable()) best = &tier;
  }
  return best;
}

std::atomic<const Tier*>& active() {
  static std::atomic<const Tier*> tier{fastest()};
  return tier;
}

std::string joined(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

}  // namespace

const Kernels& active_kernels() { return active().load(std::memory_order_relaxed)->kernels; }

std::vector<std::string> compiled_isas() {
  std::vector<std::string> names;
  for (const Tier& tier : kTiers) names.emplace_back(tier.name);
  return names;
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Tier& tier : kTiers) {
    if (tier.runnable()) names.emplace_back(tier.name);
  }
  return names;
}

std::string active_isa() { return active().load(std::memory_order_relaxed)->name; }

void set_isa(const std::string& name) {
  for (const Tier& tier : kTiers) {
    if (name != tier.name) continue;
    if (!tier.runnable()) {
      throw std::invalid_argument("SAEREC_FAST_ISA: this CPU cannot run '" + name +
                                  "'; it can run: " + joined(supported_isas()));
    }
    active().store(&tier, std::memory_order_relaxed);
    return;
  }
  throw std::invalid_argument("SAEREC_FAST_ISA: expected one of " + joined(compiled_isas()) + ", got '" + name + "'");
}

}  // namespace saerec
