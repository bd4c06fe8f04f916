// Instruction set tiers: compiled ones, those this CPU can run, and the one in use.
#pragma once

#include <string>
#include <vector>

namespace saerec {

std::vector<std::string> compiled_isas();   // slowest first
std::vector<std::string> supported_isas();  // compiled and runnable here, slowest first
std::string active_isa();
// Throws std::invalid_argument when the tier is unknown, not compiled, or not runnable on this CPU.
void set_isa(const std::string& name);

}  // namespace saerec
