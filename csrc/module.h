// What the parts of the Python module share.
#pragma once
#include <nanobind/nanobind.h>

#include <string>

#include "kernels.h"

namespace shoal {

// Throws a ValueError where this processor has none of that name.
const Kernels* kernels_named(const std::string& name);

// While it lives, `threads` of them compute and the interpreter is left to others. Throws a ValueError where there would be none.
class Computing {
  public:
    explicit Computing(int threads) {
        if (threads < 1) throw nanobind::value_error("kernels need at least one thread");
    }

  private:
    nanobind::gil_scoped_release release_;
};

void bind_decoder(nanobind::module_& m);

}  // namespace shoal
