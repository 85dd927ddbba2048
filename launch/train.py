"""`deepspeed --num_gpus 8 launch/train.py RECIPE [--stage NAME] [key=value ...]`: the same program as `l2v train`."""

import sys

from l2v.train import main

sys.exit(main())
