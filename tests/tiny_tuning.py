"""Tunes layers that Triton's interpreter runs in seconds: `TRITON_INTERPRET=1 python tests/tiny_tuning.py FOLDER`.

Run by test_gpu_campaign.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import campaign_tune
from gpu_campaign import Campaign

from resnet_fast.bench import kernels
from resnet_fast.bench.layers import Block, Layer

STEM = Layer("stem", "conv1", 3, 8, 3, 2, 1, 12, residual=False, relu=True)
FIRST = Layer("b", "conv1", 16, 32, 3, 2, 1, 8, residual=False, relu=True)
LAST = Layer("b", "conv2", 32, 32, 3, 1, 1, 4, residual=True, relu=True)
SHORTCUT = Layer("b", "downsample", 16, 32, 1, 2, 1, 8, residual=False, relu=False)
WIDE = Layer("c", "conv3", 64, 512, 1, 1, 1, 4, residual=True, relu=True)
GROUPED = Layer("c", "conv2", 32, 32, 3, 1, 4, 4, residual=False, relu=True)

CASES = [
    (kernels.layer_case(STEM), 1),
    (kernels.Case("stem with max_pool", kernels.max_pooled, STEM), 1),
    (kernels.layer_case(LAST), 3),
    (kernels.Case("last with projection", kernels.projection, Block("b", (FIRST, LAST), SHORTCUT)), 1),
    (kernels.layer_case(WIDE), 1),
    (kernels.layer_case(GROUPED), 1),
]

if __name__ == "__main__":
    campaign = Campaign(Path(sys.argv[1]), budget=600)
    campaign.begin("tune")
    campaign_tune.tune_cases(campaign, CASES, "", 1, "float16", "cpu")
