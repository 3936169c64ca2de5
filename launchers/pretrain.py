"""Pre-trains one recipe: deepspeed launchers/pretrain.py --ds ds_configs/zero3.json [--recipe NAME] [a.b=value ...]"""

import sys

from m3i_large.cli_launch import pretrain

if __name__ == "__main__":
    sys.exit(pretrain(sys.argv[1:]))
