// What the parts of the Python module share.
#pragma once
#include <nanobind/nanobind.h>

#include <string>

#include "kernels.h"

namespace shoal {

// Throws a ValueError where this processor has none of that name.
const Kernels* kernels_named(const std::string& name);

void bind_decoder(nanobind::module_& m);

}  // namespace shoal
