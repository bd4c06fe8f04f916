// Steering in Python: plans as the kernel reads them, and the calls.
#pragma once

#include <pybind11/pybind11.h>

namespace saerec {
namespace bindings {

void bind_steer(pybind11::module_& module);

}  // namespace bindings
}  // namespace saerec
