"""Makes a build of torch without CUDA accept fake tensors on a CUDA device. A build with CUDA needs none of this.

FakeTensorMode computes shapes and dtypes for any device, but two C++ objects of torch have to know the device: the
device guard, which autograd asks for the current stream, and the CUDA hooks, which autograd asks which accelerator
there is. A build without CUDA has neither, and no Python function sets them, so both are replaced through ctypes.

Such a build also takes some operations apart that are one kernel on CUDA. They are kept whole.
"""

import ctypes
import os
from typing import Any

import torch

from lcm.errors import UserError

REGISTRY = "_ZN3c104impl26device_guard_impl_registryE"  # c10::impl::device_guard_impl_registry
GET_HOOKS = "_ZN2at6detail12getCUDAHooksEv"  # at::detail::getCUDAHooks()
CUDA = 1  # c10::DeviceType::CUDA
NUM_VIRTUAL = 64  # more entries than the tables of virtual functions have
BEFORE_TABLE = 2  # entries before a table's address: offset to top, type information
IS_BUILT = (2, 3, 4)  # isBuilt, isAvailable and hasPrimaryContext in at::AcceleratorHooksInterface
# Operations that autograd takes apart on a device without a kernel for them.
KERNELS = ("silu_backward", "mish_backward")
kept: list[Any] = []  # torch keeps addresses of these objects until the process ends


def install() -> None:
    """Make "cuda" torch's accelerator, for fake tensors. Raises UserError if this torch has another layout."""
    if torch.cuda.is_available() or kept:
        return
    try:
        install_guard()
        install_hooks()
        keep_kernels_whole()
    except (OSError, AttributeError, ValueError) as error:
        raise UserError(
            f"dry run: torch {torch.__version__} cannot simulate CUDA here ({error}); allowed: a build of torch with "
            "CUDA, which needs no GPU for this, or a version that was tested (constraints.txt)"
        ) from error


def keep_kernels_whole() -> None:
    """Send each of KERNELS to the device as it is. Their parts would take several times the memory."""
    library = torch.library.Library("aten", "IMPL")
    for name in KERNELS:
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "CUDA"):
            library.impl(name, torch.library.fallthrough_kernel, "AutogradCUDA")
    kept.append(library)


def load_library(name: str) -> ctypes.CDLL:
    return ctypes.CDLL(os.path.join(os.path.dirname(torch.__file__), "lib", name))


def install_guard() -> None:
    """Register torch's own stand-in for the CUDA device guard.

    `_ensureCUDADeviceGuardSet` does that if the registered guard counts no devices. So a guard whose functions all
    return 0 is registered first.
    """
    registry = (ctypes.c_void_p * 32).in_dll(load_library("libc10.so"), REGISTRY)
    if registry[CUDA]:
        return
    zero = ctypes.CFUNCTYPE(ctypes.c_uint64)(lambda: 0)
    table = (ctypes.c_void_p * NUM_VIRTUAL)(*[ctypes.cast(zero, ctypes.c_void_p).value] * NUM_VIRTUAL)
    guard = (ctypes.c_void_p * 4)(ctypes.addressof(table))
    kept.extend([zero, table, guard])
    registry[CUDA] = ctypes.addressof(guard)
    torch._C._ensureCUDADeviceGuardSet()
    if registry[CUDA] == ctypes.addressof(guard):
        raise ValueError("its device guard was not replaced")


def install_hooks() -> None:
    """Give the object of the CUDA hooks a copy of its table of functions, in which isBuilt() is true."""
    get_hooks = getattr(load_library("libtorch_cpu.so"), GET_HOOKS)
    get_hooks.restype = ctypes.c_void_p
    hooks = ctypes.cast(get_hooks(), ctypes.POINTER(ctypes.c_void_p))
    old, size = hooks[0], BEFORE_TABLE + NUM_VIRTUAL
    if old is None:
        raise ValueError("it has no CUDA hooks")
    content = ctypes.string_at(old - 8 * BEFORE_TABLE, 8 * size)
    table = (ctypes.c_void_p * size).from_buffer_copy(content)
    true = ctypes.CFUNCTYPE(ctypes.c_bool)(lambda: True)
    for entry in IS_BUILT:
        table[BEFORE_TABLE + entry] = ctypes.cast(true, ctypes.c_void_p).value
    kept.extend([true, table])
    hooks[0] = ctypes.addressof(table) + 8 * BEFORE_TABLE
    found = torch.accelerator.current_accelerator()
    if found is None or found.type != "cuda":
        hooks[0] = old
        raise ValueError(f"its accelerator is {found}")
