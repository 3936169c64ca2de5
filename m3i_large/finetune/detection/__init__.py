"""Detection and instance segmentation in COCO's format."""
