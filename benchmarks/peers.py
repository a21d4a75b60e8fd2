"""Whole models beside every installed engine: ``resnet-fast bench [MODEL ...] --peers``, whose options it takes.

The peers: resnet_fast/bench/peers.py. How they are checked and timed: resnet_fast/bench/cells.py.
"""

import sys

from resnet_fast.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:], "--peers"]))
