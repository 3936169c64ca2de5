"""Fine-tuning for segmentation."""
