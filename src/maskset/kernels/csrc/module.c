/* An empty Python module, so that installers build and find the library like any extension module. */
#define Py_LIMITED_API 0x030b0000
#include <Python.h>

#include "maskset.h"

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_kernels", NULL, -1, NULL, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__kernels(void) { return PyModule_Create(&definition); }

/* The loader refuses a library with other signatures than the Python code was written for. */
EXPORT int32_t maskset_signatures(void) { return SIGNATURES; }
