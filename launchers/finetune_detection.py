"""Fine-tunes a detector: deepspeed launchers/finetune_detection.py --weights EXPORT --data COCO_DIR [--recipe NAME]"""

import sys

from m3i_large.cli_launch import finetune_detection

if __name__ == "__main__":
    sys.exit(finetune_detection(sys.argv[1:]))
