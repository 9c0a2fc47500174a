"""A driver for Triton where there is no GPU to ask, or one that should not be touched: enough of it
to compile. Never launches.
"""

from dataclasses import dataclass

from triton.backends.compiler import GPUTarget


@dataclass(frozen=True)
class NoDevice:
    """For driver.set_active(): kernels are then compiled for sm_`arch`."""

    arch: int

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # kernels are kept by device: each architecture has its own

    def get_current_stream(self, device: int) -> int:
        return 0
