"""Fine-tuning of an exported backbone: one loop, and what a task gives it. Detection is the task there is.

recipe      what a fine-tuning is; recipes/ft_*.yaml the paper's protocols
task        what a task gives the loop: samples, model, scores
sampling    which samples a step trains on: a pure function of (seed, step)
data        batches, made ahead of time
layer_decay learning rates that fall from the head to the stem
backbones   feature pyramids over the exported backbones
trainer     from the arguments to the end of a run
loop        what one optimizer step does, when it is measured, what is saved
detection/  COCO's format, large-scale jitter, R-CNN heads, average precision
"""
