"""m3i eval on many ranks: deepspeed launchers/evaluate.py knn,linear RUN|EXPORT --data SHARDS --train SHARDS"""

import sys

from m3i_large.cli import evaluate_on_ranks

if __name__ == "__main__":
    evaluate_on_ranks(sys.argv[1:])
