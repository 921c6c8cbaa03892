// The Python module of an extension whose functions are reached through torch.ops: importing it registers them.
// Include this in one source of each extension.
#pragma once

#include <Python.h>

#define TA_CONCATENATE_(a, b) a##b
#define TA_CONCATENATE(a, b) TA_CONCATENATE_(a, b)
#define TA_STRING_(a) #a
#define TA_STRING(a) TA_STRING_(a)

PyMODINIT_FUNC TA_CONCATENATE(PyInit_, TORCH_EXTENSION_NAME)() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, TA_STRING(TORCH_EXTENSION_NAME), nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
