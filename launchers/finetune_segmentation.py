"""Fine-tunes a segmenter: deepspeed launchers/finetune_segmentation.py --weights EXPORT --data ADE20K"""

import sys

from m3i_large.cli_launch import finetune_segmentation

if __name__ == "__main__":
    sys.exit(finetune_segmentation(sys.argv[1:]))
