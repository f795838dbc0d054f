"""CUDA C without a GPU: run by the host compiler's fibers (module), compiled for real devices by NVRTC (nvrtc).

Knows nothing of fusionops: it takes any CUDA C that reaches its shared memory through FUSIONOPS_SHARED.
"""
