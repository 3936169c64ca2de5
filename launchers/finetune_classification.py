"""Fine-tunes a classifier: deepspeed launchers/finetune_classification.py --weights EXPORT --data IMAGENET"""

import sys

from m3i_large.cli_launch import finetune_classification

if __name__ == "__main__":
    sys.exit(finetune_classification(sys.argv[1:]))
