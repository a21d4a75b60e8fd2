"""``python -m resnet_fast``: the same as the console script ``resnet-fast``."""

from .cli import main

raise SystemExit(main())
