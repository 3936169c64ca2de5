"""Fine-tuning for detection."""
