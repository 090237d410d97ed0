#include "bindings/module.h"

#ifdef KV_MUTANTS
#error "KV_MUTANTS is for the C++ tests: the module never leaves out a call"
#endif

#define KV_STRING_OF(x) #x
#define KV_STRING(x) KV_STRING_OF(x)

PYBIND11_MODULE(_core, m) {
  m.doc() = "The native part of pagedkv.";
  m.attr("__version__") = KV_STRING(KV_VERSION);
  m.attr("__compiler__") = __VERSION__;
  pagedkv::bind_errors(m);
  pagedkv::bind_values(m);
  pagedkv::bind_step_plan(m);
  pagedkv::bind_transfer_plan(m);
  pagedkv::bind_manager(m);
  pagedkv::bind_engine(m);
  pagedkv::bind_pools(m);
  pagedkv::bind_layer_writer(m);
  pagedkv::bind_cuda(m);
  pagedkv::make_all_whole(m);
}
