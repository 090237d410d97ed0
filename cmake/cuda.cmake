# The _cuda module. KV_CUDA says whether: AUTO where nvcc is, ON or OFF.
#
# The CUDA runtime is linked statically and kept to this module, so that one wheel serves every
# torch, and the module imports where there is no driver.

if(NOT KV_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "KV_CUDA is \"${KV_CUDA}\", expected AUTO, ON or OFF")
endif()
if(KV_CUDA STREQUAL "OFF")
  message(STATUS "pagedkv: KV_CUDA is OFF: a CPU-only build, without the _cuda module")
  return()
endif()

include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  if(KV_CUDA STREQUAL "ON")
    message(FATAL_ERROR
      "KV_CUDA is ON and no working nvcc was found. Set the environment variable CUDACXX to nvcc's "
      "path, or put nvcc's folder on PATH (a CUDA toolkit has it in bin/), or build without CUDA: "
      "-DKV_CUDA=OFF (pip install . -Ccmake.define.KV_CUDA=OFF).")
  endif()
  message(STATUS "pagedkv: no working nvcc: a CPU-only build, without the _cuda module "
                 "(set CUDACXX or PATH to have it)")
  return()
endif()

# Machine code for these, as far as this nvcc knows them. Devices of the same major version run the
# code of the minor below; PTX of the oldest and the newest covers what lies between and after.
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES AND NOT DEFINED ENV{CUDAARCHS})
  execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --list-gpu-arch
    OUTPUT_VARIABLE kv_known COMMAND_ERROR_IS_FATAL ANY)
  set(kv_architectures)
  foreach(architecture 80 90 100 120)
    if(kv_known MATCHES "compute_${architecture}([^0-9]|$)")
      list(APPEND kv_architectures ${architecture}-real)
    endif()
  endforeach()
  list(TRANSFORM kv_architectures REPLACE "-real" "" AT 0 -1)
  set(CMAKE_CUDA_ARCHITECTURES ${kv_architectures} CACHE STRING "CUDA architectures")
endif()

set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_EXTENSIONS OFF)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
enable_language(CUDA)
message(STATUS "pagedkv: building the _cuda module with nvcc ${CMAKE_CUDA_COMPILER_VERSION} for "
               "${CMAKE_CUDA_ARCHITECTURES}")

pybind11_add_module(_cuda
  csrc/bindings/cuda_module.cpp
  csrc/cuda/cuda_runtime.cu
  csrc/cuda/device_query.cu
  csrc/cuda/launch.cu)
target_include_directories(_cuda PRIVATE csrc)
target_link_options(_cuda PRIVATE LINKER:--exclude-libs,ALL)

# The options that every target inherits are the C++ compiler's; nvcc has its own spelling.
get_target_property(kv_cxx_options _cuda COMPILE_OPTIONS)
set_target_properties(_cuda PROPERTIES COMPILE_OPTIONS "$<$<COMPILE_LANGUAGE:CXX>:${kv_cxx_options}>")
target_compile_options(_cuda PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra>)
# It asks for a driver of CUDA 12.4: with an nvcc of 13 all have one.
if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 13.0)
  target_compile_options(_cuda PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:--compress-mode=size>)
endif()
install(TARGETS _cuda LIBRARY DESTINATION pagedkv)
