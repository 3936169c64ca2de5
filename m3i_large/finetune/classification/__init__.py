"""Image classification on folders of classes or shards."""
