"""What the Gluon kernels for Hopper share.

Owns names that differ between versions of Triton, tensors as the copy engine takes them, and the
wait for the launch before, which each group of warps does for itself. What those kernels rely on:
before the one thread that arrives at an mbarrier for a group of warps Triton (3.6, 3.7) puts a
barrier of the group, so all of the group have come that far.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ernie_engine.kernels import launch

# Triton 3.6 has the former name, 3.7 the latter.
barrier = getattr(gl, "thread_barrier", None) or gl.barrier  # pyright: ignore[reportAttributeAccessIssue]
wait_for_inputs = gluon.jit(launch.wait_for_inputs.fn)  # in Gluon


def boxes_of(tensor: Tensor, *box: int) -> TensorDescriptor:
    """`tensor` for the copy engine, half types, in boxes with 128 bytes to a row."""
    layout = gl.NVMMASharedLayout(128, 16, rank=len(box))
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), list(box), layout)
