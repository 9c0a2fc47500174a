"""That start-up finds its kernels with any one op switched to torch, without a GPU.

    python tests/model/switched_kernels.py FOLDER

Run without TRITON_INTERPRET. Prints a line for each op: its name, and how many kernels there are.
"""

import sys
from dataclasses import replace

from triton.runtime.jit import JITFunction

from ernie_engine.engine_config import EngineConfig
from ernie_engine.kernels.registry import IMPLEMENTATIONS
from ernie_engine.model.kernel_cache import meet_kernels
from ernie_engine.model.startup import describe
from ernie_engine.parallel.mesh import Mesh


def main(folder: str) -> None:
    fields = {"device": "cpu", "max_num_seqs": 3, "max_model_len": 64, "kernels": "torch"}
    described = describe(EngineConfig(model=folder, **fields))
    run = JITFunction.run
    for op in IMPLEMENTATIONS:
        met = []
        config = replace(described.config, device="cuda:0", kernels=f"triton,-{op}")
        meet_kernels(
            config, described.model_config, Mesh(), 90, lambda *kernel, met=met: met.append(kernel)
        )
        JITFunction.run = run
        print(op, len(met))


if __name__ == "__main__":
    main(sys.argv[1])
