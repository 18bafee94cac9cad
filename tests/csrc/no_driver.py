"""Without a usable GPU the CUDA functions say so in a status and a message: `no_driver.py libkecore_cuda.so`."""

from __future__ import annotations

import ctypes
import sys

BF16, F64 = 2, 3
NO_KERNEL, OLD_DRIVER, CUDA_ERROR = 5, 6, 7
SKIP = 77


class Layer(ctypes.Structure):
    """``ke_moment_layer``."""

    _fields_ = (
        ("keys", ctypes.c_void_p),
        ("key_stride", ctypes.c_int64),
        ("tokens", ctypes.c_int64),
        ("d", ctypes.c_int64),
        ("rows", ctypes.c_void_p),
        ("n_rows", ctypes.c_int64),
        ("mask", ctypes.c_void_p),
        ("moment", ctypes.c_void_p),
        ("moment_stride", ctypes.c_int64),
    )


def has_gpu() -> bool:
    """Whether the driver finds a device."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


def main(path: str) -> int:
    """Status 0 if the refusal is a clean one."""
    if has_gpu():
        sys.stdout.write("skipped: this machine has a GPU\n")
        return SKIP
    library = ctypes.CDLL(path)
    library.ke_cuda_message.restype = ctypes.c_char_p
    if library.ke_cuda_message() != b"":
        sys.stdout.write("a message before any error\n")
        return 1
    keys, moment = (ctypes.c_char * 4096)(), (ctypes.c_char * 4096)()
    begin = ctypes.addressof(keys) + -ctypes.addressof(keys) % 16
    layer = Layer(begin, 16, 4, 16, None, 0, None, ctypes.addressof(moment), 16)
    status = library.ke_second_moment_cuda(ctypes.byref(layer), 1, BF16, F64, None)
    message = library.ke_cuda_message().decode()
    sys.stdout.write(f"status {status}: {message}\n")
    return 0 if status in (NO_KERNEL, OLD_DRIVER, CUDA_ERROR) and message else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
