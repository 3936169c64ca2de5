"""From a checkpoint to the files that detection, segmentation and classification code reads, and back.

    branch    one branch of a checkpoint, tensor by tensor, without DeepSpeed
    layouts   the table of layouts: who reads a file, under which names
    keys      our names to the consumers' and back
    exporter  writes a layout and its model card
    weights   any exported or foreign file as a backbone under our names
    verify    loads a file strictly into a model of its consumer
    files     files that are whole or not there

In the field a wrong prefix is dropped by a loader that is not strict, and a detector trains from random weights. Here
every reader is strict, and `m3i verify` repeats what the consumer does.
"""

from m3i_large.export.exporter import export
from m3i_large.export.layouts import LAYOUTS
from m3i_large.export.verify import verify
from m3i_large.export.weights import Weights, import_weights, read_weights

__all__ = ["LAYOUTS", "Weights", "export", "import_weights", "read_weights", "verify"]
