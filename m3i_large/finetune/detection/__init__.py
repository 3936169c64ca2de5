"""Detection and instance segmentation in COCO's and LVIS's formats."""
